"""`python -m leapalign.studies.shapeworld_build`: trains the embedded generator, reward and judge from scratch.

The generator (after its VAE) and the two CLIP models are independent, so they are trained in parallel, one
process each. Results are kept in `--out`: finished ones are not trained again, and the generator continues from its
last state. With `--install` the finished folders, each with a model card, replace those that ship with the package.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import tyro

from leapalign.storage.embedded import FOLDER
from leapalign.studies.shapeworld_build import measure
from leapalign.studies.shapeworld_build.cards import card
from leapalign.studies.shapeworld_build.parts import Build, make_generator, make_rewards, workers

PER_TASK, NUM_STEPS = 300, 8  # prompts a task and steps of the guidance sweep; the steps are those of the recipes
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


def main(build: Build) -> None:
    out = build.out
    out.mkdir(parents=True, exist_ok=True)
    begun_at = commit()
    with workers() as pool:
        for chain in [pool.submit(make, build, begun_at) for make in (make_generator, make_rewards)]:
            chain.result()
    torch.set_num_threads(build.threads)
    scores = measured(out)
    print(json.dumps(scores, indent=1))
    for name in ("generator", "reward", "judge"):
        (out / name / "README.md").write_text(card(name, facts(out, name, build), scores))
        if build.install:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(out / name, FOLDER / name)


def commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def measured(out: Path) -> dict[str, Any]:
    """Return all numbers of the model cards; they are measured once and kept in scores.json."""
    path = out / "scores.json"
    if not path.exists():
        scores = {name: measure.reward_accuracy(str(out / name)) for name in ("reward", "judge")}
        scores["generator"] = measure.guidance_sweep(
            str(out / "generator"), SCALES, per_task=PER_TASK, num_steps=NUM_STEPS
        )
        path.write_text(json.dumps(scores, indent=1))
    return json.loads(path.read_text())


def facts(out: Path, name: str, build: Build) -> dict[str, Any]:
    """Describe how a model was trained, for its card."""
    steps = {"generator": build.generator_steps, "reward": build.reward_steps, "judge": build.judge_steps}[name]
    seed = build.seed + ("generator", "reward", "judge").index(name)
    record = json.loads((out / f"{name}.json").read_text())
    if name == "generator":
        vae = json.loads((out / "vae.json").read_text())
        record["vae"] = {"steps": build.vae_steps, "seconds": vae["seconds"]}
    if name == "reward":
        first = json.loads((out / "easy-reward.json").read_text())
        record |= {"seconds": first["seconds"] + record["seconds"], "hardening": build.hardening_steps}
    return record | {"steps": steps, "seed": seed}


if __name__ == "__main__":
    main(tyro.cli(Build))

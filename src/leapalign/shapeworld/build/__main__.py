"""`python -m leapalign.shapeworld.build`: makes the embedded generator, reward and judge, from nothing.

Parts are made in order and kept in `--out`; one that is done is not made again, and the generator goes on from its last
state. With `--install` the finished folders, each with a model card, replace those that ship with the package.
"""

# diffusers and transformers annotate some constructors more narrowly than they accept
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL

from leapalign.shapeworld.assets import FOLDER
from leapalign.shapeworld.build import measure
from leapalign.shapeworld.build.cards import card
from leapalign.shapeworld.build.clip import JUDGE, REWARD, train_clip
from leapalign.shapeworld.build.generator import train_generator
from leapalign.shapeworld.build.harden import harden_clip
from leapalign.shapeworld.build.vae import train_vae

PER_TASK, NUM_STEPS = 300, 8  # of the guidance sweep; the steps are those of the recipes
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Build:
    """Train the embedded default of leapalign."""

    out: Path = Path("build/shapeworld")
    """Work folder: states, finished parts, measurements."""
    vae_steps: int = 2400
    generator_steps: int = 8500
    reward_steps: int = 3000
    hardening_steps: int = 2500
    """Of the reward's second training, against being gamed."""
    judge_steps: int = 3000
    seed: int = 0
    """The VAE's and the generator's; the reward has the next one, the judge the one after."""
    threads: int = 1
    """Of torch."""
    install: bool = False
    """Put the finished folders into the package."""


def main(build: Build) -> None:
    torch.set_num_threads(build.threads)
    build.out.mkdir(parents=True, exist_ok=True)
    out = build.out
    make(out, "vae", lambda: train_vae(out / "vae", build.vae_steps, build.seed))
    vae = AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False)
    make(out, "generator", lambda: train_generator(out / "generator", vae, build.generator_steps, build.seed))
    easy, seed = out / "easy-reward", build.seed + 1
    make(out, "easy-reward", lambda: train_clip(easy, REWARD, build.reward_steps, seed))
    make(out, "reward", lambda: harden_clip(easy, out / "reward", REWARD, build.hardening_steps, seed))
    make(out, "judge", lambda: train_clip(out / "judge", JUDGE, build.judge_steps, build.seed + 2))
    scores = measured(out)
    print(json.dumps(scores, indent=1))
    for name in ("generator", "reward", "judge"):
        (out / name / "README.md").write_text(card(name, facts(out, name, build), scores))
        if build.install:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(out / name, FOLDER / name)


def make(out: Path, name: str, train: Callable[[], Any]) -> None:
    """Run `train` unless it has been done, and note how long it took and at which commit."""
    record = out / f"{name}.json"
    if record.exists():
        return
    start, begun_at = time.monotonic(), commit()
    train()
    done = {"seconds": round(time.monotonic() - start), "commit": begun_at, "machine": platform.machine()}
    record.write_text(json.dumps(done | {"threads": torch.get_num_threads(), "torch": torch.__version__}))


def commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def measured(out: Path) -> dict[str, Any]:
    """All numbers of the cards; measured once, kept in scores.json."""
    path = out / "scores.json"
    if not path.exists():
        scores = {name: measure.reward_accuracy(str(out / name)) for name in ("reward", "judge")}
        scores["generator"] = measure.guidance_sweep(
            str(out / "generator"), SCALES, per_task=PER_TASK, num_steps=NUM_STEPS
        )
        path.write_text(json.dumps(scores, indent=1))
    return json.loads(path.read_text())


def facts(out: Path, name: str, build: Build) -> dict[str, Any]:
    """What a card tells of the making of a part."""
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

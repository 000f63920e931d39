"""The demo: evaluate the embedded base, align it with LeapAlign, evaluate it again, and write report.html.

Nothing is selected by its result: prompts, noise and the images shown are fixed by the seed before training, and every
number has its standard error. Base and tuned model are both opened from their folders, as a user would.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leapalign.errors import UserError

if TYPE_CHECKING:
    from leapalign.evaluation.diversity import Diverse
    from leapalign.evaluation.evaluate import Detector
    from leapalign.evaluation.statistics import Evaluation
    from leapalign.prompts import Prompt
    from leapalign.report.page import Page
from leapalign.run import Run
from leapalign.storage.atomic import write_text
from leapalign.storage.lock import is_empty

PER_TASK = 60  # images a task in each evaluation: standard error of overall about 0.025
QUICK_PER_TASK, QUICK_STEPS = 4, 4
REWARD, HELD_OUT = "reward", "held_out_reward"  # names in summary.json
WORDS = {REWARD: "Reward, the one trained on", HELD_OUT: "Held-out reward, never trained on"}
IMAGE_PAIRS = 4  # a task on the page


@dataclass(frozen=True, kw_only=True)
class Study:
    """A run, and the settings with which its model is evaluated before and after on the same prompts and noise."""

    run: Run
    held_out: Any  # a reward that the run does not train on, a dataclass of leapalign.rewards
    prompts: Sequence[Prompt]
    detector: Detector | None
    diversity: Diverse | None = None  # prompts whose images are compared with each other
    command: str
    batch_size: int = 60
    evaluation_seed: int = 0  # separate from the run's seed, so that runs with several seeds can be compared


def main(out: Path, *, seed: int = 0, steps: int = 0, quick: bool = False, device: str = "auto") -> dict[str, Any]:
    """Run `leapalign demo`; return the content of summary.json. `steps` 0: the recipe's. `quick`: a short test."""
    from leapalign.prompts import ShapeWorldPrompts
    from leapalign.recipes import shapeworld_leapalign
    from leapalign.report.tables import print_study
    from leapalign.rewards.clip import PickScore
    from leapalign.shapeworld.detector import detect

    recipe = shapeworld_leapalign()
    num_steps = steps or (QUICK_STEPS if quick else recipe.steps)
    run = replace(recipe, name="demo", out=str(out), seed=seed, steps=num_steps, device=device)
    study = Study(
        run=run,
        held_out=PickScore(path="embedded:judge"),
        prompts=ShapeWorldPrompts(split="test", num=QUICK_PER_TASK if quick else PER_TASK).load(),
        detector=detect,
        diversity=shapeworld_diversity(),
        command=f"leapalign demo --out {out} --seed {seed} --steps {num_steps}{' --quick' if quick else ''}",
    )
    summary = conduct(study)
    print_study(summary, f"look at {out / 'report.html'}; the tuned pipeline is {out / 'pipeline'}")
    return summary


def shapeworld_diversity(split: Literal["validation", "test"] = "test") -> Diverse:
    """The 30 prompts, five of each task, of which four images each are compared with each other."""
    from leapalign.evaluation.diversity import Diverse
    from leapalign.prompts import ShapeWorldPrompts

    return Diverse(prompts=ShapeWorldPrompts(split=split, num=5).load(), images_per_prompt=4)


def conduct(study: Study) -> dict[str, Any]:
    """Evaluate, train and evaluate again; write all results into run.out and return the content of summary.json."""
    from leapalign.evaluation.statistics import compare
    from leapalign.training.loop import train

    run, out, begun = study.run, Path(study.run.out), time.monotonic()
    if not is_empty(out):
        raise UserError(f"{out}: this folder is not empty; give another --out")
    before = evaluate_model(study, run.model.load, "the base")
    trained_from = time.monotonic()
    result = train(run)
    trained_to = time.monotonic()
    tuned = partial(run.tuning.load_tuned, run.model, str(result.saved))
    after = evaluate_model(study, tuned, "the tuned model")
    times = {
        "base_evaluation": trained_from - begun,
        "training": trained_to - trained_from,
        "tuned_evaluation": time.monotonic() - trained_to,
    }
    comparison = compare(before, after)
    write_sheets(out, before, after)
    write_page(study, before, after, comparison, times, result.summary)
    seconds = time.monotonic() - begun
    summary = summarize(result.summary, comparison, times, seconds) | {run.tuning.output: str(result.saved)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_evaluation(out, comparison)
    return summary


def write_evaluation(out: Path, comparison: dict[str, Any]) -> None:
    """Write the result of `evaluation.statistics.compare` where `leapalign compare` reads it."""
    from leapalign.report.records import EVALUATION, EVALUATION_FILE

    (out / EVALUATION).mkdir(exist_ok=True)
    write_text(out / EVALUATION / EVALUATION_FILE, json.dumps(comparison, indent=2) + "\n")


def evaluate_model(study: Study, load: Callable[[str, str], Any], words: str, folder: Path | None = None) -> Evaluation:
    """Evaluate a model, with rewards named as in summary.json; print progress on stderr.

    `folder` keeps the images, of which those that are there are not drawn again.
    """
    from leapalign.distributed.process_group import resolve_device
    from leapalign.evaluation.evaluate import evaluate
    from leapalign.evaluation.sampling import Sampling
    from leapalign.rewards.adapt import described, load_reward

    run, begun = study.run, time.monotonic()
    _say(f"evaluating {words}: {len(study.prompts)} images")
    device = resolve_device(run.device)
    configs = {REWARD: described(run.rewards[0].reward).in_evaluations(), HELD_OUT: study.held_out}
    rewards = {name: load_reward(config, device, run.dtype) for name, config in configs.items()}
    sampling = Sampling(num_steps=run.num_sampling_steps, batch_size=study.batch_size, seed=study.evaluation_seed)
    loaded = load(device, run.dtype)
    settings = {"sampling": sampling, "rewards": rewards, "detector": study.detector, "diversity": study.diversity}
    result = evaluate(loaded, study.prompts, **settings, folder=folder)
    _say(f"  {time.monotonic() - begun:.0f} s")
    return result


def summarize(
    training: dict[str, Any], comparison: dict[str, Any], times: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Return summary.json: GenEval, both rewards and monitors before and after, with standard errors."""
    geneval = dict(comparison.get("geneval", {}))
    overall = geneval.pop("overall", None)
    rewards = comparison["rewards"]
    return {
        "geneval": {**overall, "per_task": geneval} if overall else None,
        "reward": rewards[REWARD],
        "held_out_reward": rewards[HELD_OUT],
        "open_colors": comparison.get("open_colors"),
        "diversity": comparison["diversity"],
        "image_statistics": comparison["image_statistics"],
        "evaluation_reward": training["reward"],
        "images": comparison["images"],
        "steps": training["steps"],
        "exported": training["exported"],
        "stopped": training["stopped"],
        "skipped": training["skipped"],
        "seconds": round(seconds, 3),
        "seconds_of": {name: round(value, 3) for name, value in times.items()},
        "name": training["name"],
        "out": training["out"],
    }


def write_sheets(out: Path, before: Evaluation, after: Evaluation) -> None:
    """Write before.png and after.png (same prompts and noise, one row a task) and verdicts.png with the detections."""
    from leapalign.report.page import spread
    from leapalign.report.pictures import draw_verdicts, grid

    tags = before.tags
    rows = [r for tag in dict.fromkeys(tags) for r in spread([i for i, t in enumerate(tags) if t == tag], 10)]
    columns = min(10, len(rows))
    for name, evaluation in (("before", before), ("after", after)):
        grid([evaluation.images[row] for row in rows], columns, scale=3).save(out / f"{name}.png")
    if after.verdicts:
        draw_verdicts(after, rows).save(out / "verdicts.png")


def write_page(
    study: Study,
    before: Evaluation,
    after: Evaluation,
    comparison: dict[str, Any],
    times: dict[str, float],
    training: dict[str, Any],
) -> None:
    """Write report.html. `training`: the run's own summary."""
    from leapalign.codec import encode
    from leapalign.report.page import Page, pairs_of, write_report
    from leapalign.training.tracking import read_metrics

    out = Path(study.run.out)
    page: Page = Page(
        title=f"LeapAlign: {study.run.name}",
        run=encode(study.run),
        metrics=read_metrics(out),
        comparison=comparison,
        rewards=WORDS,
        pairs=pairs_of(before, after, IMAGE_PAIRS),
        commands=(study.command, f"leapalign train {out}/run.json --out runs/again   # the training alone, replayed"),
        facts=facts(times),
        exported=training["exported"],
        stopped=training["stopped"],
    )
    write_report(out / "report.html", page)


def facts(times: dict[str, float]) -> dict[str, str]:
    """Machine, times and versions, which the page shows beside the numbers."""
    import os
    import platform
    from importlib.metadata import version

    import torch

    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.0f} s" for name, seconds in times.items())
    packages = ("leapalign", "torch", "diffusers", "transformers")
    return {
        "Time": f"{sum(times.values()):.0f} s: {parts}",
        "Machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "Versions": ", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}",
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

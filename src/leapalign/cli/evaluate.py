"""`leapalign evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.lookup.prompts import prompts_of
from leapalign.lookup.recipes import load_plugins
from leapalign.lookup.rewards import reward_config, rewards_of
from leapalign.lookup.sources import Source, find_source
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.report.tables import evaluation_table
from leapalign.rewards.adapt import load_reward
from leapalign.storage.atomic import disk_errors

if TYPE_CHECKING:
    from leapalign.evaluation.statistics import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """GenEval's tasks by a rule-based detector, and rewards, with standard errors."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    against: str = ""
    """A second model, compared over the same prompts and noises."""
    reward: tuple[str, ...] = ()
    """More rewards than the run's own: NAME, NAME=PATH, or file.py:name of your own, which is executed."""
    prompts: str = ""
    """A .txt, .jsonl or .csv file; NAME (leapalign list prompts) or NAME=PATH: its test prompts; empty = shapeworld."""
    per_task: int = 60
    """ShapeWorld test prompts of each task."""
    num: int = 1
    """Pictures a prompt."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    batch_size: int = 64
    """Pictures at a time; changes memory and time only."""
    seed: int = 0
    out: str = ""
    """A folder for the pictures; empty = keep none."""
    overwrite: bool = False
    """Replace pictures that are there."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the tables as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def evaluate_command(argv: list[str]) -> None:
    flags = tyro.cli(EvaluateFlags, args=argv, prog="leapalign evaluate")
    found = _evaluate(flags)
    answer(found, flags.json, evaluation_table(found))


def _evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """The evaluation as JSON values; with --against, a comparison in which --against is before."""
    from leapalign.evaluation.image_folder import image_paths, refuse_existing, write_images
    from leapalign.evaluation.statistics import compare, report

    prompts = prompts_of(flags.prompts or ShapeWorldPrompts.name, flags.per_task).load()
    if flags.out:
        refuse_existing(image_paths(Path(flags.out), len(prompts), flags.num), flags.overwrite)
    plugins = load_plugins(flags.plugin)
    rewards = rewards_of(flags.source, plugins) | {word: reward_config(word) for word in flags.reward}
    tuned = find_source(flags.source, plugins).changed(guidance_scale=flags.guidance)
    base = find_source(flags.against, plugins).changed(guidance_scale=flags.guidance) if flags.against else None
    after = _draw_and_judge(tuned, prompts, rewards, flags)
    if flags.out:
        with disk_errors(Path(flags.out), "give another --out"):
            write_images(Path(flags.out), prompts, after.images, per_prompt=flags.num, overwrite=flags.overwrite)
    result = compare(_draw_and_judge(base, prompts, rewards, flags), after) if base else report(after)
    return {"source": flags.source, "against": flags.against, "seed": flags.seed} | result


def _draw_and_judge(
    source: Source, prompts: Sequence[Prompt], configs: dict[str, Any], flags: EvaluateFlags
) -> Evaluation:
    from leapalign.distributed.world import resolve_device
    from leapalign.evaluation.evaluate import evaluate
    from leapalign.evaluation.sampling import Sampling
    from leapalign.lookup.detectors import find_detector

    device = resolve_device(flags.device)
    rewards = {name: load_reward(config, device, flags.dtype) for name, config in configs.items()}
    sampling = Sampling(
        num_steps=flags.steps or source.num_steps,
        images_per_prompt=flags.num,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    model = source.load(device, flags.dtype)
    detector = find_detector(prompts, source.model.height, source.model.width)
    return evaluate(model, prompts, sampling=sampling, rewards=rewards, detector=detector)

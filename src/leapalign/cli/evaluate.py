"""`leapalign evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


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
    from leapalign.evaluating import as_text, evaluate_source

    found = evaluate_source(flags)
    answer(found, flags.json, as_text(found))

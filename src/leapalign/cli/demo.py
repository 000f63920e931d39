"""`leapalign demo`."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Evaluate the embedded model, align it with LeapAlign, evaluate it again, and write a page with images."""

    out: str = ""
    """The run's folder; empty = runs/demo- and the time."""
    seed: int = 0
    steps: int = 0
    """Updates; 0 = as in the recipe."""
    quick: bool = False
    """Take a few steps and images only, to test the installation; shows no effect."""
    device: str = "auto"
    json: bool = False
    """Print summary.json on stdout, and the rest on stderr."""


def demo_command(argv: list[str]) -> None:
    flags = tyro.cli(DemoFlags, args=argv, prog="leapalign demo")
    from leapalign.studies.before_after import main as conduct_demo

    out = Path(flags.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    with redirect_stdout(sys.stderr if flags.json else sys.stdout):
        summary = conduct_demo(out, seed=flags.seed, steps=flags.steps, quick=flags.quick, device=flags.device)
    if flags.json:
        answer(summary, True, "")

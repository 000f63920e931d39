"""`leapalign sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """Draw pictures with a run's tuned weights, a pipeline folder, or embedded:generator."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    prompt: tuple[str, ...]
    """What to draw; several texts give several pictures."""
    out: Path = Path("samples")
    """Where the PNG files go."""
    overwrite: bool = False
    """Replace pictures that are there."""
    num: int = 1
    """Pictures a prompt."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    size: int = 0
    """Height and width in pixels; 0 = as in the run, or the family's usual size."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the pictures' paths as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def sample_command(argv: list[str]) -> None:
    flags = tyro.cli(SampleFlags, args=argv, prog="leapalign sample")
    from leapalign.sampling import sample

    pictures = sample(flags)
    answer(pictures, flags.json, "\n".join(picture["path"] for picture in pictures))

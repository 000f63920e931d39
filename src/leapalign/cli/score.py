"""`leapalign score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Rewards of picture files, preprocessed by Pillow as the published packages do."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Picture files."""
    reward: tuple[str, ...]
    """NAME (leapalign list rewards), NAME=PATH for other weights, or file.py:name of your own, which is executed."""
    prompt: tuple[str, ...] = ()
    """What the pictures should show: one text for all, or one an image."""
    prompts: str = ""
    """Instead: a .txt, .jsonl or .csv file with a prompt an image."""
    batch_size: int = 8
    """Pictures at a time; changes memory and time only."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the reward's weights."""
    json: bool = False
    """Print a row a picture as JSON on stdout."""


def score_command(argv: list[str]) -> None:
    flags = tyro.cli(ScoreFlags, args=argv, prog="leapalign score")
    from leapalign.scoring import as_text, score_files

    rows = score_files(flags)
    answer(rows, flags.json, as_text(rows))

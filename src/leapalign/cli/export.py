"""`leapalign export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """A finished run's weights for other programs, in a new folder."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str
    """A new folder."""
    format: Literal["pipeline", "lora", "comfyui"] = "pipeline"
    """A whole diffusers folder (an adapter is merged), a diffusers LoRA file, or one with ComfyUI's names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer or the adapter; bfloat16 halves it and rounds each weight."""
    json: bool = False
    """Print what was written as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def export_command(argv: list[str]) -> None:
    flags = tyro.cli(ExportFlags, args=argv, prog="leapalign export")
    from leapalign.exporting import as_text, export_run

    found = export_run(flags)
    answer(found, flags.json, as_text(found))

"""`leapalign export`."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_plugins, read_run
from leapalign.lookup.runs import check_run_folder
from leapalign.lookup.sources import check_base, run_source
from leapalign.run import Run
from leapalign.storage.atomic import SCRATCH, disk_errors

RECORD = "export.json"  # in the exported folder: which weights of the run these are


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write a run's weights for other programs into a new folder."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str
    """A new folder."""
    format: Literal["pipeline", "lora"] = "pipeline"
    """A whole diffusers folder (an adapter is merged), or a LoRA file as diffusers and ComfyUI read it."""
    weights: Literal["average", "live"] = "average"
    """Averaged weights of a finished run, or live (not averaged) weights of the newest checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the transformer or the adapter; bfloat16 halves the size and rounds each weight."""
    strength: float = 1.0
    """base + strength (tuned - base), from 0 to 2: 0 = the base, 1 = as trained; less keeps more variety."""
    json: bool = False
    """Print what was written as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


def export_command(argv: list[str]) -> None:
    flags = tyro.cli(ExportFlags, args=argv, prog="leapalign export")
    found = _export(flags)
    answer(found, flags.json, _as_text(found))


def _export(flags: ExportFlags) -> dict[str, Any]:
    """Write the export; return {"run", "format", "weights", "dtype", "strength", "out", "bytes"}."""
    check_run_folder(flags.run, "export")
    folder, target = Path(flags.run), Path(os.path.normpath(flags.out))
    run = read_run(folder / "run.json", load_plugins(flags.plugin))
    if flags.format not in run.tuning.formats:
        raise UserError(
            f"{folder}: a run with tuning {run.tuning.name!r} has no {flags.format} to export; "
            f"use --format {' or '.join(run.tuning.formats)}"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not overwritten; give a new folder")
    words = {"format": flags.format, "weights": flags.weights, "dtype": flags.dtype, "strength": flags.strength}
    with disk_errors(target, "give another --out"), _weights(flags, run, folder, target) as saved:
        run.tuning.export(
            run.model, str(saved), target, format=flags.format, dtype=flags.dtype, strength=flags.strength
        )
        (target / RECORD).write_text(json.dumps({"run": run.name, **words}, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"run": flags.run, **words, "out": str(target), "bytes": size}


def _weights(flags: ExportFlags, run: Run, folder: Path, target: Path) -> AbstractContextManager[Path]:
    """Return a context that gives the folder of the weights: the run's own, or a temporary one beside `target`."""
    if flags.weights == "average":
        return nullcontext(Path(run_source(folder, run, flags.strength).saved))
    from leapalign.training.live_weights import live_weights

    check_base(folder, run, flags.strength)
    return live_weights(run, folder, target.with_name(f"{SCRATCH}{target.name}-live"))


def _as_text(found: dict[str, Any]) -> str:
    what = f"{found['format']}, {found['dtype']}, {found['weights']} weights at strength {found['strength']:g}"
    return f"{found['out']}: {what}, {found['bytes'] / 1e6:.1f} MB"

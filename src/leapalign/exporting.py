"""`leapalign export`: a finished run's weights for other programs, in a new folder; nothing is overwritten."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.errors import UserError
from leapalign.lookup.recipes import load_plugins, read_run
from leapalign.sampling import run_source
from leapalign.storage.atomic import disk_errors

if TYPE_CHECKING:
    from leapalign.cli.export import ExportFlags


def export_run(flags: ExportFlags) -> dict[str, Any]:
    """Write it; {"run", "format", "dtype", "out", "bytes"}."""
    folder, target = Path(flags.run), Path(os.path.normpath(flags.out))
    run = read_run(folder / "run.json", load_plugins(flags.plugin))
    if flags.format not in run.tuning.formats:
        raise UserError(
            f"{folder}: a run with tuning {run.tuning.name!r} has no {flags.format} to export; "
            f"use --format {' or '.join(run.tuning.formats)}"
        )
    source = run_source(folder, run)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists; give a new folder, nothing is overwritten")
    with disk_errors(target, "give another --out"):
        run.tuning.export(source.model, source.saved, target, format=flags.format, dtype=flags.dtype)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"run": flags.run, "format": flags.format, "dtype": flags.dtype, "out": str(target), "bytes": size}


def as_text(answer: dict[str, Any]) -> str:
    return f"{answer['out']}: {answer['format']}, {answer['dtype']}, {answer['bytes'] / 1e6:.1f} MB"

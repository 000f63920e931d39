"""`leapalign compare`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import UserError
from leapalign.lookup.runs import check_run_folder
from leapalign.storage.atomic import disk_errors, write_text

if TYPE_CHECKING:
    from leapalign.report.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """One table of runs, finished or not, and of stored evaluations; the best of each column is bold."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, and folders that `leapalign evaluate --out` wrote."""
    markdown: str = ""
    """Write the table to this Markdown file."""
    csv: str = ""
    """Write the table with all digits to this CSV file."""
    latex: str = ""
    """Write the table as a LaTeX tabular to this file."""
    page: str = ""
    """Write an HTML page with the table, curves and settings to this file."""
    overwrite: bool = False
    """Replace files that exist."""
    json: bool = False
    """Print the table as JSON on stdout."""


def compare_command(argv: list[str]) -> None:
    flags = tyro.cli(CompareFlags, args=argv, prog="leapalign compare")
    from leapalign.report.comparison import as_json
    from leapalign.report.formats import print_comparison
    from leapalign.report.records import compare_folders

    if not flags.folders:
        raise UserError("compare: give folders of runs, as in `leapalign compare runs/a runs/b`")
    for folder in flags.folders:
        check_run_folder(folder)
    targets = {"markdown": flags.markdown, "csv": flags.csv, "latex": flags.latex, "page": flags.page}
    check_targets({kind: Path(name) for kind, name in targets.items() if name}, flags.overwrite)
    comparison = compare_folders([Path(os.path.normpath(folder)) for folder in flags.folders])
    for kind, name in targets.items():
        if name:
            with disk_errors(Path(name), "give another file"):
                write_text(Path(name), _writers()[kind](comparison))
    if flags.json:
        answer(as_json(comparison), True, "")
    else:
        print_comparison(comparison)


def check_targets(targets: dict[str, Path], overwrite: bool) -> None:
    """Raise UserError unless every file can be written: it is new or may be replaced, and no two are the same."""
    for kind, path in targets.items():
        if path.exists() and not path.is_file():  # a device would be replaced by a file of its name
            raise UserError(f"--{kind} {path} is a folder or a device; give a file")
        if path.exists() and not overwrite:
            raise UserError(f"--{kind} {path} exists and is not overwritten; give another file, or --overwrite")
        if not path.parent.is_dir():
            raise UserError(f"--{kind} {path}: there is no folder {path.parent}; make it, or give another file")
    if len({os.path.abspath(path) for path in targets.values()}) < len(targets):
        raise UserError(f"{' and '.join(f'--{kind}' for kind in targets)} name the same file; give each its own")


def _writers() -> dict[str, Callable[[Comparison], str]]:
    from leapalign.report.comparison_page import ComparisonPage, render_comparison
    from leapalign.report.formats import comma_separated, latex, markdown

    def page(comparison: Comparison) -> str:
        return render_comparison(ComparisonPage(comparison=comparison))

    return {"markdown": markdown, "csv": comma_separated, "latex": latex, "page": page}

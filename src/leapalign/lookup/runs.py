"""Check that a word names a run's folder; for files and folders inside a run, the error names the run.

Other trainers resume from a checkpoint's folder; leapalign takes the run's folder, and `--checkpoint` by its name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from leapalign.errors import UserError

CHECKPOINT = re.compile(r"step-\d{6,}")


def check_run_folder(word: str | Path, command: str = "") -> None:
    """Raise UserError if `word` is a run.json, a checkpoint or a file of one; the message names the run to give.

    `command` ("resume", "export") is what the run's folder is wanted for; empty = any.
    """
    path = Path(os.path.abspath(word))
    if path.name == "run.json" and path.is_file() and not _is_checkpoint(path.parent):
        raise UserError(f"{word} is a file of a run; {_advice(word, path.parent, command)}")
    places = (path, *path.parents)
    for folder in places:
        if folder.name == "checkpoints" and (folder.parent / "run.json").is_file():
            step = next(iter(path.relative_to(folder).parts), "")
            advice = _advice(word, folder.parent, command, step if CHECKPOINT.fullmatch(step) else "")
            raise UserError(f"{word} belongs to the checkpoints of a run; {advice}")
    if alone := next((folder for folder in places if _is_checkpoint(folder)), None):
        raise UserError(
            f"{word} is a checkpoint without its run; make a folder RUN with a copy of its run.json, move it to "
            f"RUN/checkpoints/{alone.name}, and use `leapalign {command or 'resume'} RUN`"
        )


def _is_checkpoint(folder: Path) -> bool:
    return bool(CHECKPOINT.fullmatch(folder.name)) and (folder / "state.json").is_file()


def _advice(word: str | Path, run: Path, command: str, step: str = "") -> str:
    shown = run if Path(word).is_absolute() else Path(os.path.relpath(run))
    if not command:
        return f"give the run's folder, {shown}"
    chosen = f" --checkpoint {step}" if command == "resume" and step else ""
    return f"give the run's folder: `leapalign {command} {shown}{chosen}`"

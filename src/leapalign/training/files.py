"""Files that are complete or absent: written beside their place, fsynced, renamed into it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".tmp-"  # what a killed process may leave behind; never read, removed by the next one


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Fill the folder that is handed out; when the block ends well, `target` is that folder, in one rename.

    An older `target` is moved away first and then removed.
    """
    scratch = target.with_name(f"{SCRATCH}{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    for path in sorted(scratch.rglob("*")):
        _sync(path)
    _sync(scratch)
    remove_folder(target)
    os.replace(scratch, target)
    _sync(target.parent)


def remove_folder(target: Path) -> None:
    """Rename, then delete: a process killed in between leaves no half-deleted folder under a good name."""
    if target.exists():
        old = target.with_name(f"{SCRATCH}old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        shutil.rmtree(old)


def clear_scratch(folder: Path) -> None:
    """Remove what killed processes left in a folder."""
    for path in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(target: Path, text: str) -> None:
    """Replace a file's text in one rename."""
    scratch = target.with_name(f"{SCRATCH}{target.name}")
    scratch.write_text(text, encoding="utf-8")
    _sync(scratch)
    os.replace(scratch, target)
    _sync(target.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Write files so that they are complete or absent: to a scratch name, fsynced, renamed; and explain disk errors."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from leapalign.errors import UserError

SCRATCH = ".tmp-"  # prefix of unfinished files: a killed process may leave them, the next one removes them unread
DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EIO: "the disk fails",
    errno.ENOTDIR: "a part of this path is a file and no folder",
    errno.EEXIST: "there is a file of this name, where a folder was to be",
    errno.EISDIR: "there is a folder of this name, where a file was to be",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "this link leads to itself",
}


@contextmanager
def complete_folder(target: Path, shared: str = "") -> Iterator[Path]:
    """Yield a scratch folder to fill; when the block ends without error, it becomes `target` in one rename.

    An older `target` is first renamed and then deleted. If the block fails, the scratch folder is deleted: it may be
    what fills the disk. With `shared`, other processes fill the same scratch folder, and may have created it.
    """
    scratch = scratch_folder(target, shared)
    if not shared:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=bool(shared))
    try:
        yield scratch
        for path in sorted(scratch.rglob("*")):
            _sync(path)
        _sync(scratch)
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    remove_folder(target)
    os.replace(scratch, target)
    _sync(target.parent)


def scratch_folder(target: Path, shared: str = "") -> Path:
    """The scratch folder of `target`; `shared` is the same word in all processes that fill it together."""
    return target.with_name(f"{SCRATCH}{target.name}{'-' if shared else ''}{shared}")


def remove_folder(target: Path) -> None:
    """Rename a folder, then delete it: a kill in between leaves no half-deleted folder under a good name."""
    if target.exists():
        old = target.with_name(f"{SCRATCH}old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        shutil.rmtree(old)


def clear_scratch(folder: Path) -> None:
    """Remove unfinished files that killed processes left in a folder."""
    for path in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_text(target: Path, text: str) -> None:
    """Replace a file's text in one rename."""
    scratch = target.with_name(f"{SCRATCH}{target.name}")
    scratch.write_text(text, encoding="utf-8")
    _sync(scratch)
    os.replace(scratch, target)
    _sync(target.parent)


def refuse_links_out(out: Path) -> None:
    """Raise UserError for a link in a run's folder that leads outside: the folder may come from somebody else."""
    for path in (*out.glob("*"), *(out / "checkpoints").glob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the run's folder, and a run writes into its own "
                "folder only; replace the link by what it points to (RUN itself may be a link)"
            )


def refuse_other_kinds(out: Path, files: Sequence[str], folders: Sequence[str]) -> None:
    """Raise UserError where a folder has the name of a file that a run writes, or a file that of a folder."""
    for name in files:
        if (out / name).is_dir():
            raise UserError(f"{out / name} is a folder, and a run writes a file there; move it away")
    for name in folders:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"{out / name} is a file, and a run has a folder there; move it away")


@contextmanager
def disk_errors(out: Path, way_out: str) -> Iterator[None]:
    """Turn errors of the disk (full, read-only, ...) into a UserError with the place, the free space and `way_out`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in DISK_PROBLEMS:
            raise
        place = (error.filename if isinstance(error, OSError) else None) or out
        raise UserError(f"{place}: {DISK_PROBLEMS[number]}{_free(out, number)}; {way_out}") from error


def _errno(error: Exception) -> int | None:
    """The error's errno; safetensors writes in Rust and has the number only in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"(?:code: |os error )(\d+)", str(error))
    return int(found[1]) if found else None


def _free(out: Path, number: int | None) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f" ({shutil.disk_usage(out).free / 2**20:.0f} MiB are free)"


def _sync(path: Path) -> None:
    """fsync a file or folder. Windows cannot open folders, and syncs only files that are open for writing."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Allow one process per run folder, by a lock that the operating system releases when its holder exits or is killed."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from leapalign.errors import UserError

LOCK = ".lock"  # never deleted: two processes could then lock two files of the same name
HOLDER = ".lock-holder"  # the holder's process id and host; a killed holder leaves it
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold RUN/.lock while open. Raises UserError, which names the holder, if another process holds it.

    On a file system without locks, prints a warning to stderr instead.
    """
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        way_out = "wait for it, or stop it (`kill PID`: it saves and can be resumed)"
        raise UserError(f"{out}: {_holder(out)} works on this run; {way_out}") from None
    except (OSError, NotImplementedError) as error:  # older filelock raises NotImplementedError instead of ENOSYS
        if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
            raise
        print(f"{out}: this file system has no locks; start one process on this run only", file=sys.stderr)
    (out / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        (out / HOLDER).unlink(missing_ok=True)
        lock.release()


def is_empty(out: Path) -> bool:
    """Return True if there is no such folder, or if it holds only what a run leaves that was refused at its start."""
    return not out.is_dir() or all(path.name in (LOCK, HOLDER) for path in out.iterdir())


def _holder(out: Path) -> str:
    try:
        return (out / HOLDER).read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    except FileNotFoundError:  # the holder is just starting or ending
        return "another process"

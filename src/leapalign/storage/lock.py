"""One process a run's folder: a lock that the kernel gives back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leapalign.errors import UserError

LOCK = ".lock"  # stays in the folder: deleting it would let two processes lock two files of one name
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold RUN/.lock; UserError that names the other process where there is one.

    flock and not fcntl's own locks, which a process loses when it closes the file anywhere, and which let one process
    lock twice. Where the file system has no locks, a warning is all there can be.
    """
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(handle, out)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise UserError(
            f"{out}: {holder} works on this run; wait for it, or stop it (`kill PID`: it saves and can be resumed)"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(f"{out}: this file system has no locks; start one process on this run only", file=sys.stderr)

"""Standard streams that outlive their reader: closed terminals and pipes do not end a training run.

`leapalign train ... | tee log` and Ctrl-C, `... | head`, a closed terminal window, a full disk behind `> log`, and a
start with `2>&-` all leave stderr or stdout unable to take another line. RUN/log.txt keeps the messages of a run.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

# A lost stdout is an error.
PRINTS_ITS_RESULT = {"list", "score", "evaluate", "verify", "cache", "export", "sample", "compare"}


def prepare_streams(command: str) -> None:
    """Open closed standard descriptors on the null device; make stderr, and stdout of a training command, outlive
    their readers.

    On Windows only the first: a console there is no file descriptor that takes UTF-8.
    """
    _open_closed_descriptors()
    posix = os.name == "posix"
    if posix or sys.stderr is None:
        sys.stderr = outliving(2, sys.stderr)
    if (posix and command not in PRINTS_ITS_RESULT) or sys.stdout is None:
        sys.stdout = outliving(1, sys.stdout)


def outliving(descriptor: int, stream: TextIO | None) -> TextIO:
    """Open a text stream on the descriptor, encoded like `stream`, that drops output which cannot be written."""
    encoding, by_line = "utf-8", True
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        encoding, by_line = stream.encoding, stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(_DroppingFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=by_line)


class _DroppingFile(io.FileIO):
    """A file that reports every write as done: EPIPE, EIO of a terminal that has gone, ENOSPC, EAGAIN."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def _open_closed_descriptors() -> None:
    """Open closed descriptors; otherwise the run's next file could get number 2 and receive every message."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one

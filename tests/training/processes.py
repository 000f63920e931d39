"""The command line in a forked process: killed, signalled and waited for, without the price of an import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Child:
    pid: int
    log: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit status (minus the signal that killed it), and all that it said."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.log.read_text()


def fork(action: Callable[[], int], log: Path) -> Child:
    """`action`'s answer is the exit status; stdout and stderr go to `log`."""
    pid = os.fork()
    if pid:
        return Child(pid, log)
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started pytest
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  # pytest has put its own there
        status = action()
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(status)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)

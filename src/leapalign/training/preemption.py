"""Requests to stop: a signal or the time limit. The current step is finished and saved first.

Signals: SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal or the connection has gone), SIGUSR1 (Slurm's
`--signal=USR1@120`) and SIGUSR2 (submitit). The exit status is 128 + the signal's number, as a shell reports a process
that the signal killed; 75 at the time limit (EX_TEMPFAIL of sysexits.h: try again later). The resumed run is the
same as an uninterrupted one. A second SIGINT leaves at once, with the last checkpoint intact.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

OUT_OF_TIME = 75
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)  # Windows has two
MARGIN = 1.2  # assumed time of a step or save / longest one so far


@dataclass
class Stop:
    """Pending request to stop; read before each step."""

    max_seconds: float = 0.0  # limit of this process; 0 = none
    begun: float = field(default_factory=time.monotonic)
    longest_step: float = 0.0  # seconds, including evaluation and the copy to a checkpoint
    signal: signal.Signals | None = None

    def took(self, seconds: float) -> None:
        """Record the duration of a step."""
        self.longest_step = max(self.longest_step, seconds)

    def reason(self, save_seconds: float) -> tuple[str, int] | None:
        """Return (reason, exit status) to stop before the next step, or None. `save_seconds`: estimate of a save.

        The time limit never stops the first step of a process, so that a queue that restarts the run makes progress.
        """
        if self.signal:
            return f"stopped by {self.signal.name}", 128 + self.signal
        needed = MARGIN * (self.longest_step + save_seconds)
        if self.max_seconds and self.longest_step and time.monotonic() - self.begun + needed > self.max_seconds:
            return f"stopped in time for max_hours ({self.max_seconds / 3600:g})", OUT_OF_TIME
        return None


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """Record the signals of `SIGNALS` in `stop`; a SIGINT after one of them raises KeyboardInterrupt.

    A signal that the parent ignores (nohup, a script's background job) stays ignored. Python delivers signals to the
    main thread only; in any other thread (a server, a notebook's worker) nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signal.Signals(number)
        text = f"\n{stop.signal.name}: finishing this step and saving; Ctrl-C leaves at once\n"
        with suppress(OSError):  # `| tee` gets the same Ctrl-C and may have ended first
            os.write(2, text.encode())  # print is not reentrant

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

"""Asked to stop: SIGTERM, SIGINT or the end of the time that a run has. The step is finished and saved first.

What comes of it: exit status 143, 130 or 75 (EX_TEMPFAIL of sysexits.h: try again later), and a run that resumes as if
nothing had been. A second SIGINT leaves at once; the last checkpoint is whole, because checkpoints always are.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

OUT_OF_TIME = 75
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
MARGIN = 1.2  # a step or a save may take so much longer than the longest one so far


@dataclass
class Stop:
    """Whether to go on: asked before each step."""

    max_seconds: float = 0.0  # of this process; 0 = no limit
    begun: float = field(default_factory=time.monotonic)
    longest_step: float = 0.0  # seconds, including evaluation and the copy to a checkpoint
    signal: signal.Signals | None = None

    def took(self, seconds: float) -> None:
        """A step's time."""
        self.longest_step = max(self.longest_step, seconds)

    def reason(self, save_seconds: float) -> tuple[str, int] | None:
        """Why to stop before the next step, and the exit status; `save_seconds`: what saving may take.

        The first step of a process is always made, so that a queue that starts the run again and again gets on.
        """
        if self.signal:
            return f"stopped by {self.signal.name}", STATUS[self.signal]
        needed = MARGIN * (self.longest_step + save_seconds)
        if self.max_seconds and self.longest_step and time.monotonic() - self.begun + needed > self.max_seconds:
            return f"stopped in time for max_hours ({self.max_seconds / 3600:g})", OUT_OF_TIME
        return None


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT are written into `stop`; a SIGINT after either raises KeyboardInterrupt.

    A signal that the parent has switched off (a job that a script put into the background) stays off. Python hands
    signals to the main thread only: in another one (a server, a notebook's worker) nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signal.Signals(number)
        text = f"\n{stop.signal.name}: finishing this step and saving; Ctrl-C leaves at once\n"
        os.write(2, text.encode())  # print is not allowed to interrupt a print

    heard = [number for number in STATUS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

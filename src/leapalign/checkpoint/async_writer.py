"""Asynchronous checkpoints: tensors are copied to CPU memory at once, and a thread writes them.

One checkpoint is written at a time. A save that comes before the previous one has ended waits for it: no checkpoint is
skipped, and one copy of the run in CPU memory is enough. An error in the thread is raised in the run before its next
step. At the end, and when the run is asked to stop, the run waits for the last save.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from leapalign.checkpoint import checkpoints
from leapalign.checkpoint.checkpoints import Snapshot
from leapalign.checkpoint.sharded import Part
from leapalign.distributed.tensors import Named, local

SLOW_DISK = 100e6  # bytes per second, until a save has been measured


class Saver:
    """Writes snapshots in a thread. A context: leaving it waits for the last save, except after a second Ctrl-C."""

    def __init__(self, *, asynchronous: bool, parameters: Named) -> None:
        self._copies = Copies() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._part: Part | None = None
        self._written: float | None = None  # seconds of the longest write
        # estimate until the first save: weights, their average and two moments
        self._bytes = 4 * sum(local(p).numel() * p.element_size() for p in parameters.values())
        self.step = -1  # step of the last save

    def save(self, snapshot: Snapshot, sync: Callable[[], None]) -> None:
        """Save, or start to save; `sync` puts the metrics on the disk before the checkpoint is complete."""
        self.wait()
        self.step, self._bytes, self._part = snapshot.step, snapshot.bytes, snapshot.part
        if self._copies is None:
            self._work(snapshot, sync)
            return self._raise()
        snapshot = replace(snapshot, tensors=self._copies.of(snapshot.tensors))
        # a daemon, so that leaving at once does not wait for it; a half-written checkpoint is ignored
        self._thread = threading.Thread(target=self._work, args=(snapshot, sync), daemon=True, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has ended."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress and raise its error."""
        self._join()
        self._raise()

    def seconds_needed(self) -> float:
        """Upper estimate of the next save's seconds, including the rest of the save in progress."""
        once = self._written if self._written is not None else self._bytes / SLOW_DISK
        return once * (2 if self._thread and self._thread.is_alive() else 1)

    def _work(self, snapshot: Snapshot, sync: Callable[[], None]) -> None:
        begun = time.monotonic()
        try:
            checkpoints.save(snapshot, sync)
        except BaseException as error:  # passed to the run, which raises it
            self._error = error
        self._written = max(self._written or 0.0, time.monotonic() - begun)

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):  # the run's own error is raised after the save
            if self._part:
                self._part.writers.ending.set()
            self._join()
            if self._error:
                print(f"and the checkpoint of step {self.step} could not be saved: {self._error}", file=sys.stderr)


class Copies:
    """CPU copies of tensors, in memory that the next save reuses; pinned for tensors on CUDA."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    def of(self, groups: dict[str, Named]) -> dict[str, Named]:
        """Copy all tensors, by the same names; the copies are complete on return."""
        copied: dict[str, Named] = {
            group: {name: self._copy(group, name, tensor) for name, tensor in named.items()}
            for group, named in groups.items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        memory = self._memory.get((group, name))
        if memory is None:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[group, name] = memory
        return memory.copy_(tensor.detach(), non_blocking=tensor.is_cuda)

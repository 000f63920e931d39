"""A run's records: metrics.jsonl (one line a step), TensorBoard events, log.txt (messages), and progress on stderr.

If stderr has lost its reader (a closed terminal, `| head`), its messages are dropped; log.txt keeps them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from leapalign.errors import RunInterrupted, RunStopped, UserError
from leapalign.storage.atomic import write_text

Metrics = dict[str, Any]
LOG = "log.txt"
QUIET_SECONDS = 5.0  # between two plain lines without a terminal


class Tracker:
    """Writes metrics and messages. A context: leaving it notes in log.txt how the run ended, and closes all files."""

    def __init__(self, out: Path, start: int, total: int, position: int = 0) -> None:
        """`start`: updates done, of `total`; `position`: bytes of metrics.jsonl up to them."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "metrics.jsonl"
        truncate_metrics(self.path, position)
        self.file = self.path.open("a", encoding="utf-8")
        self.messages = (out / LOG).open("a", encoding="utf-8")
        self.events = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.display = _display(start, total)
        self.warned = False  # warn once per run

    def log(self, metrics: Metrics) -> None:
        """Write a step's metrics; `metrics["step"]` is the number of updates done, 0 for the base model."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):  # a table is for the file only
                self.events.add_scalar(name, value, metrics["step"])
        if "reward" in metrics:
            with suppress(OSError):  # see the top of this file
                self.display.show(metrics)

    def note(self, text: str) -> None:
        """Tell the user, on stderr and in log.txt."""
        self._record(text)
        with suppress(OSError):
            self.display.note(text)

    def _record(self, text: str) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.messages.write(f"{now} process {os.getpid()}: {text}\n")
        self.messages.flush()

    def position(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self.path.stat().st_size  # every line is flushed

    def sync(self) -> None:
        """Flush the metrics to disk, before the checkpoint that refers to them. Callable from any thread."""
        os.fsync(self.file.fileno())
        self.events.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            expected = isinstance(error, (RunInterrupted, RunStopped, UserError))
            with suppress(OSError):  # a full disk is reported by the error that ends the run
                self._record(str(error) if expected else "".join(traceback.format_exception(error)))
        with suppress(OSError):
            self.messages.close()
        self.file.close()
        self.events.close()
        with suppress(OSError):
            self.display.close()


class Silent:
    """Tracker of ranks that write nothing."""

    warned = True

    def log(self, metrics: Metrics) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def position(self) -> int:
        return 0

    def sync(self) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass


def truncate_metrics(path: Path, position: int) -> None:
    """Cut the file at the checkpoint's position; steps logged after it by a killed process are repeated."""
    if path.exists():
        write_text(path, kept_metrics(path, position))


def kept_metrics(path: Path, position: int) -> str:
    """Return the first `position` bytes of metrics.jsonl; empty if the file is gone.

    Raises UserError if the file is shorter, `position` lies within a line, or a line is not a JSON object.
    """
    if not path.exists():
        return ""
    kept, way_out = path.read_bytes()[:position], "put it back, or delete it to go on without the lines so far"
    if len(kept) < position or not (kept.endswith(b"\n") or not kept):
        raise UserError(
            f"{path}: the checkpoint was saved when this file had {position} bytes, of which some are lost or changed; "
            f"{way_out}"
        )
    for number, line in enumerate(kept.splitlines(), start=1):
        if not _is_object(line):
            raise UserError(f"{path}, line {number}: this is not a JSON object, which each step writes; {way_out}")
    return kept.decode("utf-8")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_metrics(out: Path) -> list[Metrics]:
    """Read metrics.jsonl: one dictionary per step, in order."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]


def _display(start: int, total: int) -> _Plain | _Rich:
    return _Rich(start, total) if sys.stderr.isatty() else _Plain(start, total)


class _Rich:
    """A progress bar on a terminal."""

    def __init__(self, start: int, total: int) -> None:
        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")]
        self.bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task("", total=total, completed=start)
        self.bar.start()

    def show(self, metrics: Metrics) -> None:
        text = f"reward {metrics['reward']:.4f}  gradient {metrics['grad_norm']:.3g}"
        self.bar.update(self.task, completed=metrics["step"], description=text)

    def note(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


class _Plain:
    """A plain line every `QUIET_SECONDS`, for logs."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total
        self.begun, self.shown = time.monotonic(), float("-inf")

    def show(self, metrics: Metrics) -> None:
        now, step = time.monotonic(), metrics["step"]
        if now - self.shown < QUIET_SECONDS and step < self.total:
            return
        self.shown = now
        left = (now - self.begun) / max(1, step - self.start) * (self.total - step)
        text = f"reward {metrics['reward']:.4f}  gradient {metrics['grad_norm']:.3g}  left {left:.0f} s"
        print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

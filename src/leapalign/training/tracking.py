"""What a run leaves to look at: metrics.jsonl (one line a step), TensorBoard events, and a line for the eyes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from leapalign.errors import UserError
from leapalign.storage.atomic import write_text

Metrics = dict[str, Any]
QUIET_SECONDS = 5.0  # between two plain lines where there is no terminal


class Tracker:
    """Writes a step's metrics everywhere. Close it, whatever happens."""

    def __init__(self, out: Path, start: int, total: int, position: int = 0) -> None:
        """`start`: updates done; `position`: bytes of metrics.jsonl that belong to them."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "metrics.jsonl"
        truncate_metrics(self.path, position)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.display = _display(start, total)
        self.warned = False  # said once a run

    def log(self, metrics: Metrics) -> None:
        """One step: `metrics["step"]` is the number of updates done; step 0 is the base model's evaluation."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            if name != "step":
                self.events.add_scalar(name, value, metrics["step"])
        if "reward" in metrics:
            self.display.show(metrics)

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self.display.note(text)

    def position(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self.path.stat().st_size  # every line is flushed

    def sync(self) -> None:
        """On disk before a checkpoint is: a resumed run must find the lines up to its step. From any thread."""
        os.fsync(self.file.fileno())
        self.events.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()
        self.display.close()


class Silent:
    """The tracker of ranks that write nothing."""

    warned = True

    def log(self, metrics: Metrics) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def position(self) -> int:
        return 0

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def truncate_metrics(path: Path, position: int) -> None:
    """Keep the bytes that were there at the checkpoint: what a killed process logged after it is done again."""
    if path.exists():
        write_text(path, kept_metrics(path, position))


def kept_metrics(path: Path, position: int) -> str:
    """The lines up to a checkpoint. UserError where the file is shorter, cut within a line, or not of JSON objects.

    A file that is gone begins anew.
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
            raise UserError(f"{path}, line {number}: this is no JSON object, as each step writes one; {way_out}")
    return kept.decode("utf-8")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_metrics(out: Path) -> list[Metrics]:
    """The run's metrics, step by step."""
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
    """A line now and then where no one watches."""

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

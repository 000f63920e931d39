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

from leapalign.training.files import write_text

Metrics = dict[str, Any]
QUIET_SECONDS = 5.0  # between two plain lines where there is no terminal


class Tracker:
    """Writes a step's metrics everywhere. Close it, whatever happens."""

    def __init__(self, out: Path, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "metrics.jsonl"
        truncate_metrics(self.path, start)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.display = _display(start, total)
        self.warned = False  # said once a run

    def log(self, metrics: Metrics) -> None:
        """One step: `metrics["step"]` is the number of updates done; step 0 is the base model's probe."""
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

    def sync(self) -> None:
        """On disk before a checkpoint is: a resumed run must find the lines up to its step."""
        os.fsync(self.file.fileno())
        self.events.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()
        self.display.close()


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`: what a killed process logged after its checkpoint is done again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in lines if step))  # step 0: a fresh start


def read_metrics(out: Path) -> list[Metrics]:
    """The run's metrics, step by step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half line of a killed process


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

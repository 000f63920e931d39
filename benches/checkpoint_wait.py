"""What a checkpoint costs: time that training waits for it, and time from a kill to the next finished step.

    python benches/checkpoint_wait.py > checkpoint_wait.json

`wait`: the ShapeWorld recipe's model beside `--ballast` MB of further trained weights (average and both moments come on
top, so a checkpoint has four times that). In turns, with and without the thread: a save, then so many updates that the
thread has ended, then the next save. Measured is what `Session.save` takes, with the first save of each way, which
makes its memory, left out; and how much longer the updates beside the thread are than without a save.
`restart`: a run is killed by SIGKILL and resumed, both as processes of their own; from the kill to the next line of
metrics.jsonl, imports, loading, encoding and self-checks included. `processor_seconds` is what the resumed process
computed in that time, and what a busy machine does not change.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from shared import facts

from leapalign.checkpoint import checkpoints
from leapalign.checkpoint.async_writer import Saver
from leapalign.checkpoint.state import Progress
from leapalign.recipes import shapeworld_leapalign
from leapalign.training.direct import update
from leapalign.training.engine import Engine, build
from leapalign.training.weights import EMA


@dataclass(frozen=True, kw_only=True)
class CheckpointWait:
    """Seconds that training waits for a checkpoint, and seconds from a kill to the next step, as JSON on stdout."""

    repeats: int = 7
    ballast: int = 64
    """MB of trained weights beside the model's own."""
    batch_size: int = 8
    restarts: int = 3
    out: str = ""
    """Where checkpoints are written; empty = the folder for temporary files."""


def measure(bench: CheckpointWait, folder: Path) -> dict[str, object]:
    """Both parts."""
    return {"wait": wait(bench, folder), "restart": restart(bench, folder)} | facts(bench)


def wait(bench: CheckpointWait, folder: Path) -> dict[str, object]:
    """Medians over interleaved repeats, and the median of their ratios."""
    engine = _engine(bench, folder)
    savers = {way: Saver(asynchronous=way == "async", parameters=engine.parameters) for way in ("async", "sync")}
    step, rounds = 0, []
    for number in range(bench.repeats + 1):
        seconds: dict[str, float] = {"plain_update": _seconds(lambda: update(engine, 0))}
        for way, saver in savers.items() if number % 2 else reversed(savers.items()):
            step += 1
            parts = (engine.parameters, engine.ema.shadow, engine.optimizer)
            snapshot = checkpoints.take(engine.run, Progress(step=step), *parts)
            seconds[way] = _seconds(lambda: saver.save(snapshot, lambda: None))  # noqa: B023  # called at once
            if way == "async":
                seconds["update_beside_it"] = _seconds(lambda: update(engine, 0))
                seconds["until_written"] = seconds[way] + seconds["update_beside_it"] + _seconds(saver.wait)
        rounds.append(seconds)
    rounds = rounds[1:]
    return {
        "checkpoint_mb": round(snapshot.bytes / 1e6, 1),
        "seconds": {name: median(each[name] for each in rounds) for name in rounds[0]},
        "async_over_sync": median(each["async"] / each["sync"] for each in rounds),
        "update_beside_it_over_plain": median(each["update_beside_it"] / each["plain_update"] for each in rounds),
    }


def restart(bench: CheckpointWait, folder: Path) -> dict[str, object]:
    """From SIGKILL to the next finished step of the resumed process."""
    out, seconds, processor = folder / "killed", [], []
    flags = {"out": out, "steps": 10_000, "checkpoint-every": 1, "evaluate-every": 0, "batch-size": bench.batch_size}
    flags |= {"micro-batch-size": bench.batch_size, "device": "cpu"}
    process = _start(["train", "shapeworld-leapalign", *(str(w) for n, v in flags.items() for w in (f"--{n}", v))])
    _until_new_line(out, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(bench.restarts):
        begun, used = time.perf_counter(), _children_seconds()
        process = _start(["resume", str(out)])
        _until_new_line(out, process)
        seconds.append(time.perf_counter() - begun)
        process.send_signal(signal.SIGKILL)
        process.wait()
        processor.append(_children_seconds() - used)
    return {"seconds": median(seconds), "processor_seconds": median(processor), "all": seconds}


def _children_seconds() -> float:
    """Processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _engine(bench: CheckpointWait, folder: Path) -> Engine:
    """Some large trained weights that no forward uses, but that are averaged, stepped and saved."""
    size = bench.batch_size
    run = replace(
        shapeworld_leapalign(), batch_size=size, micro_batch_size=size, steps=1, evaluation_size=1, device="cpu"
    )
    run = replace(run, out=str(folder / "wait"), keep_checkpoints=1)
    engine = build(run)
    (folder / "wait" / "checkpoints").mkdir(parents=True)
    ballast = {f"ballast.{i}": torch.nn.Parameter(torch.randn(1000, 1000)) for i in range(bench.ballast // 4)}
    parameters = dict(engine.parameters) | ballast
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)
    for p in ballast.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    return replace(engine, parameters=parameters, optimizer=optimizer, ema=EMA(parameters, run.ema_decay))


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "leapalign", *words], env=os.environ, **silence)


def _until_new_line(out: Path, process: subprocess.Popen[bytes]) -> None:
    """One line more than there are now, or than are left of them after the resumed process has cut the file."""
    seen = b""
    while process.poll() is None:
        now = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else b""
        if seen and len(now) > len(seen) and now.endswith(b"\n"):
            return
        seen = now if not seen or len(now) < len(seen) else seen
        time.sleep(0.002)
    raise SystemExit(f"the run in {out} ended by itself with {process.returncode}")


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


if __name__ == "__main__":
    settings = tyro.cli(CheckpointWait)
    with tempfile.TemporaryDirectory(dir=settings.out or None) as scratch:
        print(json.dumps(measure(settings, Path(scratch)), indent=2))

"""Kills: runs that are SIGKILLed at random moments, resumed until they are finished, and compared with one that is not.

    python benches/kills.py > kills.json

Each attempt is a process of its own (a fork of this one, which has imported everything, so that kills meet training and
saving and not imports) that calls the command line: `train`, then `resume` until the run is finished. A run is killed
`kills` times: each time when it has got to a random one of the steps that are left, and up to half a step's time later;
every second time in the save that comes then. `while_saving` counts the kills that cut a save in two.
Compared are the sha256 of all tensors of the last checkpoint and of the tuned weights, and metrics.jsonl line by line
without the seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch._dynamo  # with the two below: imported before the forks, so that no kill meets an import
import torch.utils.tensorboard
import tyro
from shared import facts

from leapalign.cli import main
from leapalign.storage.atomic import SCRATCH
from leapalign.storage.files import sha256
from leapalign.training import loop
from leapalign.training.tracking import read_metrics

_ = (torch._dynamo, torch.utils.tensorboard, loop)
RECIPE = Path(__file__).parents[1] / "tests" / "training" / "tiny_recipe.py"


@dataclass(frozen=True, kw_only=True)
class Kills:
    """Killed and resumed runs against an undisturbed one, as JSON on stdout."""

    runs: int = 30
    kills: int = 2
    """Of each run; one that ends between the random step and the kill is killed less often."""
    steps: int = 40
    checkpoint_every: int = 2
    seed: int = 0
    """Of the moments."""


def measure(bench: Kills, folder: Path) -> dict[str, object]:
    """All runs in `folder`."""
    (folder / "prompts.txt").write_text("red\na green one\nblue and more\nthe fourth prompt\nfive\n")
    moments = random.Random(bench.seed)
    seconds = _undisturbed(bench, folder / "whole") / bench.steps
    expected = last_state(folder / "whole")
    counts = {
        "runs": 0,
        "killed_runs": 0,
        "kills": 0,
        "while_saving": 0,
        "other_weights": 0,
        "other_metrics": 0,
        "failures": 0,
    }
    for number in range(bench.runs):
        out = folder / f"run-{number}"
        attempts = killed(bench, out, moments, seconds)
        counts["killed_runs"] += len(attempts) > 1
        for status, saving in attempts:
            counts["kills"] += status == -signal.SIGKILL
            counts["while_saving"] += saving
            counts["failures"] += status > 0
        state = last_state(out)
        counts["runs"] += 1
        counts["other_weights"] += state[0] != expected[0]
        counts["other_metrics"] += state[1] != expected[1]
    same = not (counts["other_weights"] or counts["other_metrics"] or counts["failures"])
    return counts | {"same": same, "seconds_a_step": seconds}


def killed(bench: Kills, out: Path, moments: random.Random, seconds: float) -> list[tuple[int, bool]]:
    """Train, kill, resume, kill, ..., until the end: each attempt's status, and whether a save was cut in two."""
    attempts = []
    for number in range(bench.kills + 1):
        child = start(argv(bench, out))
        if number < bench.kills:
            last = bench.steps * 3 // 4  # later, a run could end before it is killed
            _await_step(out, moments.randint(min(_lines(out), last), last))
            time.sleep(moments.uniform(0, seconds / 2))
            if number % 2:
                _await_save(out, moments)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        attempts.append((status, any((out / "checkpoints").glob(f"{SCRATCH}*"))))
        if status == 0:
            break
    return attempts


def _lines(out: Path) -> int:
    """Steps in metrics.jsonl, whose first line is the base model's evaluation on the fixed set."""
    path = out / "metrics.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _await_step(out: Path, goal: int, most: float = 60.0) -> None:
    """Until a run has got so far."""
    end = time.monotonic() + most
    while time.monotonic() < end and _lines(out) < goal:
        time.sleep(0.001)


def _await_save(out: Path, moments: random.Random, most: float = 2.0) -> None:
    """Until a checkpoint is being written, and a random part of its time more; or until there will be none."""
    end = time.monotonic() + most
    while time.monotonic() < end and not any((out / "checkpoints").glob(f"{SCRATCH}*")):
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, 0.005))


def argv(bench: Kills, out: Path) -> list[str]:
    """`resume` where there is something to resume; a run killed before that begins again."""
    if (out / "run.json").exists():
        return ["resume", str(out), "--plugin", str(RECIPE)]
    flags = {"steps": bench.steps, "checkpoint-every": bench.checkpoint_every, "out": out}
    flags |= {"prompts.path": out.parent / "prompts.txt", "evaluate-every": 5}
    return ["train", f"{RECIPE}:tiny", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def start(words: Sequence[str]) -> int:
    """The command in a process of its own; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    status = 1
    try:
        status = main(words)
    finally:
        os._exit(status)


def last_state(out: Path) -> tuple[dict[str, str], list[dict[str, object]]]:
    """sha256 of the last checkpoint's tensors and of the tuned weights; the metrics without seconds."""
    newest = max((out / "checkpoints").glob("step-*"))
    files = [*newest.glob("*.safetensors"), *(out / "pipeline").glob("*.safetensors")]
    metrics = [{name: value for name, value in line.items() if name != "seconds"} for line in read_metrics(out)]
    return {path.name: sha256(path) for path in files} | {"step": newest.name}, metrics


def _undisturbed(bench: Kills, out: Path) -> float:
    begun = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(start(argv(bench, out)), 0)[1])
    if status:
        raise SystemExit(f"the undisturbed run ended with {status}: {' '.join(argv(bench, out))}")
    return time.monotonic() - begun


if __name__ == "__main__":
    settings = tyro.cli(Kills)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(settings, Path(scratch)) | facts(settings), indent=2))

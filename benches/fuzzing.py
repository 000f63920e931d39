"""Fuzz: wrong command lines, run.json, prompts, folders, checkpoints, images and safetensors, and how each one ends.

    python benches/fuzzing.py > fuzz.json
    python benches/fuzzing.py --seed 7 --inputs 500 --processes 0

Each input is a real command line and what was done to the user's files before it (tests/fuzz/inputs.py). It must end
with 0, with 2 and one message, or with another status that the command documents; it must lose nothing and write
nowhere else (tests/fuzz/sandbox.py). `problems` has those that did not. `kinds` counts inputs and statuses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hypothesis
import tyro
from shared import facts

from fuzz import given
from fuzz.inputs import KINDS, one_of
from fuzz.sandbox import Input, Outcome, Sandbox

SHOWN = 2000  # letters of a problem


@dataclass(frozen=True, kw_only=True)
class Fuzz:
    """Inputs of all kinds, as JSON on stdout."""

    inputs: int = 2400
    """Run in this process, shared evenly by the kinds."""
    processes: int = 50
    """Run as `python -m leapalign`, each."""
    seed: int = 0
    """0: the same inputs every time; others: others."""
    kind: str = ""
    """This one only."""


def measure(bench: Fuzz, folder: Path) -> dict[str, Any]:
    """All inputs, in sandboxes below `folder`. RuntimeError where there are fewer than asked for."""
    kinds = [bench.kind] if bench.kind else [*KINDS]
    answer: dict[str, Any] = {"inputs": 0, "processes": 0, "kinds": {}, "problems": []}
    with sandbox(folder) as box:
        for name, total, run in (
            ("inputs", bench.inputs, box.run),
            ("processes", bench.processes, box.run_process),
        ):
            for place, kind in enumerate(kinds):
                count = total // len(kinds) + (place < total % len(kinds))
                outcomes = ended(kind, count, box, run, bench.seed)
                answer[name] += len(outcomes)
                answer["kinds"].setdefault(kind, {})[name] = _counts([*outcomes.values()])
                answer["problems"] += [_told(one, outcome) for one, outcome in outcomes.items() if outcome.problem]
    return answer


@contextmanager
def sandbox(folder: Path) -> Iterator[Sandbox]:
    """With a cache in the working folder, and nothing of the user's home."""
    before = dict(os.environ)
    os.environ |= {"LEAPALIGN_CACHE": "cache", "HOME": str(folder / "home")}
    try:
        yield Sandbox(folder / "box", given.write)
    finally:
        os.environ.clear()
        os.environ.update(before)


def ended(kind: str, count: int, box: Sandbox, run: Callable[[Input], Outcome], seed: int) -> dict[Input, Outcome]:
    """How `count` different inputs of a kind ended. RuntimeError where there are not so many."""
    outcomes: dict[Input, Outcome] = {}

    @hypothesis.given(one_of(kind, box.files))
    def each(one: Input) -> None:
        possible = run != box.run_process or not any("\0" in word for word in one.argv)  # no system passes NUL
        if len(outcomes) < count and possible and one not in outcomes:
            began = time.monotonic()
            outcomes[one] = run(one)
            end = outcomes[one]
            print(f"{kind} {time.monotonic() - began:.1f} s: {end.status} {one.argv} {end.problem}", file=sys.stderr)

    settings = hypothesis.settings(
        max_examples=2 * count + 20,
        derandomize=seed == 0,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    if count:
        (hypothesis.seed(seed)(settings(each)) if seed else settings(each))()
    if len(outcomes) < count:
        raise RuntimeError(f"{len(outcomes)} different inputs of the kind {kind}, expected {count}")
    return outcomes


def _counts(outcomes: list[Outcome]) -> dict[str, int]:
    statuses = Counter(f"ended {outcome.status}" for outcome in outcomes)
    return {
        "inputs": len(outcomes),
        **dict(sorted(statuses.items())),
        "problems": sum(bool(o.problem) for o in outcomes),
    }


def _told(one: Input, outcome: Outcome) -> dict[str, Any]:
    """Enough to do it again by hand."""
    changes = [f"{c.path}: {c.instead} {c.target or repr(c.content[-120:])}" for c in one.changes]
    return {
        "kind": one.kind,
        "argv": one.argv,
        "changes": changes,
        "status": outcome.status,
        "problem": outcome.problem[:SHOWN],
        "stderr": outcome.err[-SHOWN:],
    }


if __name__ == "__main__":
    settings = tyro.cli(Fuzz)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries in Rust print warnings to stdout
    with tempfile.TemporaryDirectory() as scratch:
        answer = measure(settings, Path(scratch))
    print(json.dumps(answer | facts(settings), indent=2), file=answers)
    sys.exit(1 if answer["problems"] else 0)

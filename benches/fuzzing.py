"""Fuzz: wrong command lines, run.json, prompts, folders, checkpoints, pictures and safetensors, and how each one ends.

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
from fuzz.inputs import KINDS
from fuzz.sandbox import Input, Outcome, Sandbox

QUIET = [*hypothesis.HealthCheck]
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
    """All inputs, in sandboxes below `folder`."""
    os.environ |= {"LEAPALIGN_CACHE": "cache", "HOME": str(folder / "home")}
    sandbox = Sandbox(folder / "box", given.write)
    kinds = [bench.kind] if bench.kind else [*KINDS]
    answer: dict[str, Any] = {"inputs": 0, "processes": 0, "kinds": {}, "problems": []}
    for name, total, run in (
        ("inputs", bench.inputs, sandbox.run),
        ("processes", bench.processes, sandbox.run_process),
    ):
        for place, kind in enumerate(kinds):
            count = total // len(kinds) + (place < total % len(kinds))
            ended = [*_ended(kind, count, sandbox, run, bench.seed)]
            answer[name] += len(ended)
            answer["kinds"].setdefault(kind, {})[name] = _counts([outcome for _, outcome in ended])
            answer["problems"] += [_told(each, outcome) for each, outcome in ended if outcome.problem]
    return answer


def _ended(
    kind: str, count: int, sandbox: Sandbox, run: Callable[[Input], Outcome], seed: int
) -> Iterator[tuple[Input, Outcome]]:
    """`count` inputs of a kind, and how they ended: exactly as many, each of them once."""
    if not count:
        return
    ended: dict[Input, Outcome] = {}

    @hypothesis.given(KINDS[kind](sandbox.files))
    def each(one: Input) -> None:
        possible = run != sandbox.run_process or not any("\0" in word for word in one.argv)  # no system passes NUL
        if len(ended) < count and possible and one not in ended:
            began = time.monotonic()
            ended[one] = run(one)
            print(f"{kind} {time.monotonic() - began:.1f} s: {ended[one].status} {one.argv}", file=sys.stderr)

    settings = hypothesis.settings(
        max_examples=3 * count + 20,
        derandomize=seed == 0,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=QUIET,
    )
    (hypothesis.seed(seed)(settings(each)) if seed else settings(each))()
    yield from ended.items()


def _counts(outcomes: list[Outcome]) -> dict[str, int]:
    statuses = Counter(f"ended {outcome.status}" for outcome in outcomes)
    return {"inputs": len(outcomes), **dict(sorted(statuses.items())), "problems": sum(bool(o.problem) for o in outcomes)}


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
    with tempfile.TemporaryDirectory() as scratch:
        answer = measure(settings, Path(scratch))
    print(json.dumps(answer | facts(settings), indent=2))
    sys.exit(1 if answer["problems"] else 0)

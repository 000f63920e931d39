"""Weak scaling over gloo ranks on one machine: seconds a step, and bytes that a rank hands to collectives.

The batch grows with the ranks, so that each has the same work. For sharded weights also with `gather_in_rollout`.

    python benches/scaling.py                 # ranks 1 and 2 on the embedded model
    python benches/scaling.py --ranks 1 2 4 --num-sampling-steps 25

Bytes are counted where torch hands a tensor to the process group: of an all-gather the whole result, of a
reduce-scatter the whole input, of an all-reduce the tensor. What then goes over the wires depends on the algorithm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from shared import facts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leapalign.distributed.process_group import joined
from leapalign.recipes import shapeworld_leapalign
from leapalign.run import Run
from leapalign.training import direct, loop
from leapalign.tuning.lora import LoRA

WAYS: dict[str, dict[str, Any]] = {
    "replicate": {"sharding": "replicate"},
    "lora, replicate": {"sharding": "replicate"},
    "full": {"sharding": "full"},
    "full, gathered in the rollout": {"sharding": "full", "gather_in_rollout": True},
}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Weak scaling; JSON on stdout."""

    ranks: tuple[int, ...] = (1, 2)
    per_rank: int = 4  # samples of a rank, one micro-batch
    num_sampling_steps: int = 10
    steps: int = 5  # measured updates; one more warms up
    kind: Literal["parent", "worker"] = "parent"  # the bench starts its own workers
    out: str = ""  # of a worker


class Bytes(TorchDispatchMode):
    """Counts bytes and calls of c10d's collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").rstrip("_")
            sizes = [_size(arg) for arg in args if arg is not None]
            self.bytes[name] += max(sizes, default=0)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _size(arg: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(arg) if isinstance(t, torch.Tensor))


def measured(run: Run, bench: Scaling) -> dict[str, Any]:
    """Of one engine: median seconds an update, and what one update hands to collectives."""
    with joined(run) as world:
        engine = loop.build(run, world)
        direct.update(engine, 0)
        seconds = []
        for step in range(1, 1 + bench.steps):
            begun = time.perf_counter()
            direct.update(engine, step)
            seconds.append(time.perf_counter() - begun)
        with Bytes() as count:
            direct.update(engine, 1 + bench.steps)
        worst = max(world.gather(median(seconds)))
    sent = {name: {"bytes": count.bytes[name], "calls": count.calls[name]} for name in sorted(count.bytes)}
    return {"seconds": worst, "bytes": sum(count.bytes.values()), "collectives": sent}


def worker(bench: Scaling) -> None:
    """One rank: every way, one after the other."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    answers = {}
    for name, changes in WAYS.items():
        if ranks == 1 and changes["sharding"] == "full":
            continue
        recipe = shapeworld_leapalign()
        if name.startswith("lora"):
            recipe = replace(recipe, tuning=LoRA(rank=8))
        batch = {"batch_size": bench.per_rank * ranks, "micro_batch_size": bench.per_rank, "samples_per_draw": 0}
        run = replace(recipe, **batch, num_sampling_steps=bench.num_sampling_steps, device="cpu", **changes)
        answers[name] = measured(run, bench)
    if int(os.environ["RANK"]) == 0:
        Path(bench.out).write_text(json.dumps(answers))
    if ranks > 1:
        dist.destroy_process_group()


def parent(bench: Scaling) -> Iterator[tuple[int, dict[str, Any]]]:
    """The answers of each number of ranks."""
    flags = ["--per-rank", bench.per_rank, "--num-sampling-steps", bench.num_sampling_steps, "--steps", bench.steps]
    for ranks in bench.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "answers.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, __file__, *flags]
            command += ["--kind", "worker", "--out", out]
            subprocess.run(list(map(str, command)), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            yield ranks, json.loads(out.read_text())


def main(bench: Scaling) -> None:
    found = dict(parent(bench))
    alone = found[min(found)]
    ratios = {
        str(ranks): {
            name: round(answer["seconds"] / alone[name if name in alone else "replicate"]["seconds"], 3)
            for name, answer in answers.items()
        }
        for ranks, answers in found.items()
    }
    print(json.dumps({"ranks": found, "step_time_over_one_rank": ratios} | facts(bench), indent=2))


if __name__ == "__main__":
    settings = tyro.cli(Scaling)
    worker(settings) if settings.kind == "worker" else main(settings)

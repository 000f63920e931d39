"""Sharded weights: the most memory that one rank needs in a backward through several forwards, by setting of the graph.

A stack of equal linear blocks is spread over gloo ranks as a policy is (FSDP2). Each way makes its forwards one after
the other, as leaps do, and goes backward. Resident memory of rank 0 is sampled while it runs; tensors are large enough
for the allocator to give them back at once. Numbers are in units of one block's weights, above what lies there before.

    python benches/sharded_memory.py > sharded_memory.json

`autograd` is the plain velocity, whose gradients autograd adds up, whole, before they are shared out.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from shared import facts
from torch import Tensor, nn

from leapalign.distributed.fsdp import shard
from leapalign.distributed.process_group import joined
from leapalign.flow.graph import inputs_only, own_backward
from leapalign.recipes import shapeworld_leapalign

INTERVAL = 0.0005  # seconds between two looks


@dataclass(frozen=True, kw_only=True)
class ShardedMemory:
    """Memory of a backward on sharded weights; JSON on stdout."""

    ranks: int = 2
    blocks: int = 8
    width: int = 1024
    """Of a block, whose two layers have 8 width² weights."""
    forwards: tuple[int, ...] = (1, 2)
    kind: Literal["parent", "worker"] = "parent"  # the bench starts its own workers
    out: str = ""  # of a worker


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Block(width) for _ in range(blocks)), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x) * sigma


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(policy: Any, width: int, wrap: Callable[[Any], Any], forwards: int) -> dict[str, int]:
    """Bytes above those before: the most, and what is left (the gradients' parts)."""
    policy.zero_grad()
    gc.collect()
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(INTERVAL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    x, velocity = torch.randn(2, width).requires_grad_(), wrap(policy)
    for _ in range(forwards):
        x = velocity(x, torch.ones(()))
    x.sum().backward()
    done.set()
    watcher.join()
    gc.collect()
    return {"peak": highest - before, "left": resident() - before}


def worker(bench: ShardedMemory) -> None:
    """One rank: every way twice, of which the second counts."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = {"batch_size": bench.ranks, "micro_batch_size": 1, "samples_per_draw": 0}
    run = replace(shapeworld_leapalign(), **size, device="cpu", sharding="full")
    policy, unit, rows = Stack(bench.blocks, bench.width), 4 * 8 * bench.width**2, {}
    with joined(run) as world:
        shards = shard(run, policy, world, "cpu")
        assert shards is not None  # sharding="full"
        ways = {"autograd": lambda v: v, "all": own_backward}
        ways["inputs"] = partial(inputs_only, recomputation=shards.recomputation)
        for name, wrap in ways.items():
            for forwards in bench.forwards:
                measured(policy, bench.width, wrap, forwards)
                found = measured(policy, bench.width, wrap, forwards)
                rows[f"{name}, {forwards}"] = {key: round(value / unit, 2) for key, value in found.items()}
        if world.main:
            Path(bench.out).write_text(json.dumps(rows))


def main(bench: ShardedMemory) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", bench.ranks, __file__]
        words += ["--ranks", bench.ranks, "--blocks", bench.blocks, "--width", bench.width]
        words += ["--forwards", *bench.forwards, "--kind", "worker", "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run(list(map(str, words)), check=True, env=environment, stdout=sys.stderr)
        rows = json.loads(out.read_text())
    most = max(bench.forwards)
    peaks = {name: rows[f"{name}, {most}"]["peak"] for name in ("autograd", "all", "inputs")}
    over = {name: round(peak / peaks["autograd"], 3) for name, peak in peaks.items()}
    print(json.dumps({"blocks": rows, "peak_over_autograd": over} | facts(bench), indent=2))


if __name__ == "__main__":
    settings = tyro.cli(ShardedMemory)
    worker(settings) if settings.kind == "worker" else main(settings)

"""What torchrun starts: the bytes that rank 0 really holds, beside those of the plan, as JSON.

torchrun --nproc-per-node 2 tests/planning/rank_case.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from leapalign.distributed.process_group import joined
from leapalign.distributed.tensors import local
from leapalign.planning.plan import make_plan
from leapalign.recipes import RECIPES
from leapalign.run import Run
from leapalign.training import direct, loop
from leapalign.tuning.lora import LoRA
from tiny_recipes import tiny, write_folders


def held(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def compared(run: Run) -> dict[str, Any]:
    """Part -> [planned, held]."""
    with joined(run) as world:
        plan = make_plan(run, world.size).memory
        engine = loop.build(run, world)
        direct.update(engine, 0)
        moments = [s[key] for s in engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        networks = [reward.network() for reward in engine.rewards.values()]
        found = {
            "transformer": [*engine.model.policy.parameters(), *engine.model.policy.buffers()],
            "optimiser (AdamW, two moments)": moments,
            "average (EMA, float32)": engine.ema.shadow.values(),
            "rewards": [p for network in networks for p in network.parameters()],
        }
        return {part: [plan[part], held(tensors)] for part, tensors in found.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        write_folders(folder)
    dist.barrier()
    run = tiny(RECIPES["flux-leapalign-pickscore"](), folder, folder / "run")
    run = replace(run, samples_per_draw=0, micro_batch_size=1)
    ways = {
        "replicate": replace(run, sharding="replicate"),
        "full": replace(run, sharding="full", shard_rewards=("pickscore",)),
        "lora": replace(run, sharding="full", tuning=LoRA(rank=2)),
        "hybrid": replace(run, sharding="hybrid", shard_ranks=1),
    }
    answers = {name: compared(way) for name, way in ways.items()}
    if dist.get_rank() == 0:
        (folder / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

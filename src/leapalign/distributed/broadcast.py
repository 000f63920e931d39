"""Load a policy that will be sharded on rank 0 alone; the other ranks build it on the meta device and get their shards.

While it loads, a machine of eight ranks holds one copy in CPU memory, not eight, and no GPU ever holds a whole copy:
rank 0 reads to the CPU, `fully_shard` moves block by block, and tensors are broadcast one at a time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leapalign.distributed.choice import may_shard
from leapalign.distributed.fsdp import Shards, shard
from leapalign.distributed.tensors import like
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.run import Run
from leapalign.storage.pipeline_folder import FROM_FILES, Loading


def loading(run: Run, world: World, device: str) -> Loading:
    """Return how this rank loads the model: only rank 0 reads a policy that may be sharded, to the CPU."""
    if not may_shard(run, world, device):
        return FROM_FILES
    return Loading(policy="cpu" if world.main else "meta")


def spread(run: Run, policy: nn.Module, world: World, device: str) -> Shards | None:
    """Shard the policy if the run asks for it, and put every rank's values on its device; None for a replicated policy.

    Raises UserError if ranks have read different weights or models.
    """
    if not any(world.gather(any(p.is_meta for p in policy.parameters()))):
        world.check_weights(policy)
        return shard(run, policy, world, device)
    values = _agree_on_types(policy, world)
    shards = shard(run, policy, world, device)
    _send(policy, values, world, device)
    return shards


def _agree_on_types(policy: nn.Module, world: World) -> dict[str, Tensor]:
    """Give each tensor its dtype on rank 0 (a file may keep some in float32). Returns the values, on rank 0 alone."""
    values = {name: t.detach() for name, t in _tensors(policy).items()}
    expected = world.from_main({name: (t.shape, t.dtype) for name, t in values.items()})
    with world.agreed():
        if {name: t.shape for name, t in values.items()} != {name: shape for name, (shape, _) in expected.items()}:
            raise UserError(f"rank {world.rank} has a different model than rank 0; give every rank the same files")
    if world.main:
        return values
    for name, t in _tensors(policy).items():
        t.data = torch.empty(t.shape, dtype=expected[name][1], device=t.device)
    return {}


@torch.no_grad()
def _send(policy: nn.Module, values: dict[str, Tensor], world: World, device: str) -> None:
    """Broadcast rank 0's values, tensor by tensor; of a sharded tensor each rank keeps its shard."""
    if world.main:
        nn.Module.to(policy, device)  # moves unsharded tensors; diffusers' own `to` may warn
    else:
        policy.to_empty(device=device)
    for name, t in _tensors(policy).items():
        sent = torch.empty(t.shape, dtype=t.dtype, device=device)
        if world.main:
            sent.copy_(values[name])
        dist.broadcast(sent, src=0)
        if not world.main:
            t.copy_(like(sent, t))


def _tensors(policy: nn.Module) -> dict[str, Tensor]:
    return dict(policy.named_parameters()) | dict(policy.named_buffers())

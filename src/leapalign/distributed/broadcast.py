"""A policy that will be sharded is read by rank 0 alone: the others build its shape and are sent their parts.

So a machine of eight ranks holds one copy in its memory while it loads, not eight, and no GPU ever holds a whole one:
rank 0 reads to the CPU, `fully_shard` moves block by block, and each tensor is sent by itself.
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
    """How this rank loads the model: of a policy that may be sharded, only rank 0 reads the weights, to the CPU."""
    if not may_shard(run, world, device):
        return FROM_FILES
    return Loading(policy="cpu" if world.main else "meta")


def spread(run: Run, policy: nn.Module, world: World, device: str) -> Shards | None:
    """Shard the policy where the run asks for it; then every rank has its values on its device, whoever read them.

    Raises UserError where ranks have read other weights, or another model.
    """
    if not any(world.gather(any(p.is_meta for p in policy.parameters()))):
        world.check_weights(policy)
        return shard(run, policy, world, device)
    values = _agree_on_types(policy, world)
    shards = shard(run, policy, world, device)
    _send(policy, values, world, device)
    return shards


def _agree_on_types(policy: nn.Module, world: World) -> dict[str, Tensor]:
    """Every tensor gets the dtype that it has on rank 0 (a file may keep some in float32); rank 0's values."""
    values = {name: t.detach() for name, t in _tensors(policy).items()}
    expected = world.from_main({name: (t.shape, t.dtype) for name, t in values.items()})
    with world.agreed():
        if {name: t.shape for name, t in values.items()} != {name: shape for name, (shape, _) in expected.items()}:
            raise UserError(f"rank {world.rank} has another model than rank 0; give every rank the same files")
    if world.main:
        return values
    for name, t in _tensors(policy).items():
        t.data = torch.empty(t.shape, dtype=expected[name][1], device=t.device)
    return {}


@torch.no_grad()
def _send(policy: nn.Module, values: dict[str, Tensor], world: World, device: str) -> None:
    """Rank 0's values, tensor by tensor; of a sharded one each rank keeps its part."""
    if world.main:
        nn.Module.to(policy, device)  # what is not sharded; diffusers' own `to` may warn
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

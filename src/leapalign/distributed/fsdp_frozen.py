"""FSDP of frozen modules (`shard_rewards`; text encoders: prompts.py), by FSDP2's `fully_shard`.

The repeated blocks are sharded. Embeddings and first and last layers (a few per cent) stay whole on every rank, because
rewards and pipelines call them outside the module's own forward, where FSDP2 does not gather. No weight has a gradient;
the score's gradient passes through the gathered blocks to the image.

All ranks gather together, so all must call such a network equally often: a reward scores the same number of images on
every rank, and cached prompt features (CLIP's) are computed on all ranks as soon as one rank needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from leapalign.distributed.fsdp import mesh_of
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.rewards.adapt import Wrapped
from leapalign.rewards.base import Reward
from leapalign.run import Run


@dataclass(frozen=True, kw_only=True)
class InStep(Wrapped):
    """A reward with sharded blocks, which all ranks call together on the same number of images."""

    world: World

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score this rank's images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        self.reward.prepare(sorted({prompt for some in self.world.gather(prompts) for prompt in some}))
        return self.reward(images, prompts)


def check_names(run: Run, names: Sequence[str]) -> None:
    """Raise UserError if `shard_rewards` names a reward that the run lacks, or one with a device of its own."""
    terms = dict(zip(names, run.rewards))
    for name in run.shard_rewards:
        if name not in terms:
            raise UserError(f"shard_rewards: unknown reward {name!r}; the run has {', '.join(names)}")
        if terms[name].device:
            raise UserError(
                f"shard_rewards: the reward {name} has its own device ({terms[name].device}), but a sharded reward is "
                "spread over the devices of all ranks; set only one of the two"
            )


def shard_rewards(run: Run, rewards: dict[str, Reward], world: World, device: str) -> dict[str, Reward]:
    """Shard the blocks of the rewards in `shard_rewards`; return all rewards. Raises UserError if one has no blocks."""
    if world.size == 1 or not run.shard_rewards:
        return rewards
    blocks = {}
    for name in run.shard_rewards:
        network = rewards[name].network()
        if network is None:
            raise UserError(f"shard_rewards: the reward {name} has no network (`model`, an nn.Module) to be sharded")
        blocks[name] = blocks_of(network, f"shard_rewards: the reward {name}")
    mesh = mesh_of(run, world, device)
    for name in run.shard_rewards:
        shard_blocks(blocks[name], mesh)
    together = {name: InStep(reward=rewards[name], world=world) for name in run.shard_rewards}
    return {name: together.get(name, reward) for name, reward in rewards.items()}


def shard_blocks(blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Make each block its own FSDP group, gathered for its forward and its backward."""
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def blocks_of(network: nn.Module, what: str) -> list[nn.Module]:
    """List a network's repeated blocks. Raises UserError if it has none, or if blocks share weights."""
    blocks = list(_listed(network))
    if not blocks:
        raise UserError(f"{what} has no repeated blocks (an nn.ModuleList) that could be sharded; leave it whole")
    owned = [id(p) for block in blocks for p in block.parameters()]
    if len(owned) > len(set(owned)):
        raise UserError(f"{what} has blocks that share weights, which cannot be sharded; leave it whole")
    return blocks


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of every outermost nn.ModuleList that have weights."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _listed(child)

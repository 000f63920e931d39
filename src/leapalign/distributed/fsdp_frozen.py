"""Sharded on demand: the frozen networks beside the policy, rewards and text encoders, by FSDP2's `fully_shard`.

Their repeated blocks are sharded. Embeddings, first and last layers (a few per cent) stay whole on every rank, because
rewards and pipelines call them by themselves, and FSDP2 gathers in a module's own forward only. No weight has a
gradient; that of a score goes through the gathered blocks to the picture.

Ranks gather together, so each must call such a network as often as the others:
- a reward is called on equally many pictures, and what it keeps of a prompt (CLIP's text features) it computes on all
  ranks as soon as one of them needs it;
- a prompt that one rank lacks is encoded by all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from leapalign.distributed.fsdp import mesh_of
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.models.pipeline import PipelineModel
from leapalign.rewards.adapt import Wrapped
from leapalign.rewards.base import Reward
from leapalign.run import Run
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, PipelineFolder


@dataclass(frozen=True, kw_only=True)
class InStep(Wrapped):
    """A reward with sharded blocks: every rank calls it at the same time, on as many pictures."""

    world: World

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of this rank's pictures."""
        self.reward.prepare(sorted({prompt for some in self.world.gather(prompts) for prompt in some}))
        return self.reward(images, prompts)


def check_names(run: Run, names: Sequence[str]) -> None:
    """UserError where `shard_rewards` asks for what the run does not have, or for one on another device."""
    terms = dict(zip(names, run.rewards))
    for name in run.shard_rewards:
        if name not in terms:
            raise UserError(f"shard_rewards: there is no reward {name!r}; the run has {', '.join(names)}")
        if terms[name].device:
            raise UserError(
                f"shard_rewards: the reward {name} has a device of its own ({terms[name].device}), and all ranks' "
                "devices hold a part of a sharded one; leave out one of the two"
            )


def shard_rewards(run: Run, rewards: dict[str, Reward], world: World, device: str) -> dict[str, Reward]:
    """The same rewards, those that `shard_rewards` names with sharded blocks. UserError where that cannot be."""
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


def prepare(run: Run, model: Any, prompts: Sequence[str], world: World, device: str) -> None:
    """Encode the run's prompts: each rank by itself, or all together where `shard_text_encoders` asks for it."""
    if world.size == 1 or not run.shard_text_encoders:
        with world.agreed():
            model.prepare(prompts)
        return
    if not isinstance(model, PipelineModel):
        raise UserError(f"shard_text_encoders: {type(run.model).__name__} encodes its prompts in a way of its own")
    lacking = world.gather(model.prompts.missing(model.with_negative(prompts)))
    if new := list(dict.fromkeys(prompt for some in lacking for prompt in some)):
        sharded = Loading(component=partial(_load_sharded, mesh=mesh_of(run, world, device)))
        model.prompts.encode(new, model.load_encoder(sharded))
    model.prompts.free()


def _load_sharded(folder: PipelineFolder, name: str, dtype: Any, mesh: DeviceMesh) -> Any:
    """A component from the folder's files; the blocks of a text encoder are sharded."""
    part = load_component(replace(folder, loading=FROM_FILES), name, dtype)
    if isinstance(part, nn.Module):
        shard_blocks(blocks_of(part, f"shard_text_encoders: {name}"), mesh)
    return part


def shard_blocks(blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Each is a group of its own, gathered for its own forward and backward."""
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def blocks_of(network: nn.Module, what: str) -> list[nn.Module]:
    """A network's repeated blocks. UserError where there is none, or where they share weights."""
    blocks = list(_listed(network))
    if not blocks:
        raise UserError(f"{what} has no repeated blocks (an nn.ModuleList) that could be sharded; leave it whole")
    owned = [id(p) for block in blocks for p in block.parameters()]
    if len(owned) > len(set(owned)):
        raise UserError(f"{what} has blocks that share weights, which cannot be sharded; leave it whole")
    return blocks


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """The elements with weights of all lists of modules that lie in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _listed(child)

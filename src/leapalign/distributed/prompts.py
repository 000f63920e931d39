"""The prompts of a run, encoded by all ranks together before training begins.

Ranks that share a prompt cache on disk share the work: each encodes every N-th of the prompts that their samples reach,
and all read the entries. A rank whose cache is its own (another machine's disk, or memory only) encodes what its own
samples reach. An embedding does not depend on what is encoded beside it, so the numbers are those of one process.

Ranks agree after every encoder call, so that none waits for another longer than one call takes, and an error of one
ends all. Sharded text encoders (`shard_text_encoders`) gather together: there all ranks encode the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from leapalign.distributed.fsdp import mesh_of
from leapalign.distributed.fsdp_frozen import blocks_of, shard_blocks
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.models.base import Model
from leapalign.models.pipeline import PipelineModel
from leapalign.models.prompt_embeds.cache import BATCH, PromptCache
from leapalign.run import Run
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, PipelineFolder


def prepare(run: Run, model: Model, reached: Sequence[Sequence[str]], world: World, device: str) -> None:
    """Encode the run's prompts and free the text encoders; `reached`: by rank, the prompts that its samples need.

    A model of the user's own, which is no `PipelineModel`, encodes on every rank what that rank needs. Raises UserError
    where its text encoders should be sharded.
    """
    if not isinstance(model, PipelineModel):
        if world.size > 1 and run.shard_text_encoders:
            raise UserError(f"shard_text_encoders: {type(run.model).__name__} encodes its prompts in a way of its own")
        with world.agreed():
            model.prepare(reached[world.rank])
    elif world.size == 1:
        model.prepare(reached[0])
    else:
        needed = [model.with_negative(prompts) for prompts in reached]
        if run.shard_text_encoders:
            _encode_in_step(run, model, needed[world.rank], world, device)
        else:
            _encode_shares(model.prompts, needed, world)
        model.prompts.free()


def _encode_shares(cache: PromptCache, needed: list[list[str]], world: World) -> None:
    """Each rank encodes its share of what its group needs, then whatever it still cannot see of its own."""
    group = ranks_that_share(cache, world)
    together = list(dict.fromkeys(prompt for rank in group for prompt in needed[rank]))
    with world.agreed():
        cache.keep(together)
        share = cache.missing(together[group.index(world.rank) :: len(group)])
    _encode(cache, share, group, world)
    with world.agreed():  # entries that a slow file system does not show yet, or that another run has pruned
        rest = cache.missing(needed[world.rank])
    _encode(cache, rest, [world.rank], world)


def _encode(cache: PromptCache, prompts: list[str], group: list[int], world: World) -> None:
    """Encode this rank's prompts, an encoder call at a time. The group's first rank makes room on disk for them all."""
    counts = world.gather(len(prompts))
    busy = [rank for rank in group if counts[rank]]
    calls = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    with world.agreed():  # before the others write, whose entries would be counted twice
        if busy and world.rank == busy[0]:
            cache.encode(calls.pop(0), room_for=sum(counts[rank] for rank in group))
    for turn in range(max(world.gather(len(calls)))):
        with world.agreed():
            if turn < len(calls):
                cache.encode(calls[turn])


def ranks_that_share(cache: PromptCache, world: World) -> list[int]:
    """The ranks that read and write the same prompt cache on disk as this one, itself among them.

    Found by a file that each rank puts there: equal paths on two machines may be two disks.
    """
    if not any(world.gather(cache.store is not None)):
        return [world.rank]
    with world.agreed():
        mark = cache.store.mark() if cache.store else None
    names = world.gather(mark.name if mark else "")
    seen = world.gather([bool(mark and name and mark.with_name(name).exists()) for name in names])
    if mark:  # every rank has looked
        mark.unlink(missing_ok=True)
    return [rank for rank, marks in enumerate(seen) if rank == world.rank or (mark and marks == seen[world.rank])]


def _encode_in_step(run: Run, model: PipelineModel, needed: list[str], world: World, device: str) -> None:
    """With sharded text encoders: all ranks encode, in the same order, what one of them lacks."""
    cache = model.prompts
    group = ranks_that_share(cache, world)
    lacking = world.gather(cache.missing(needed))
    new = list(dict.fromkeys(prompt for some in lacking for prompt in some))
    if not new:
        return
    own = new[group.index(world.rank) :: len(group)] if len(group) > 1 else lacking[world.rank]
    sharded = Loading(component=partial(_load_sharded, mesh=mesh_of(run, world, device)))
    cache.keep(new)
    room = len(new) if world.rank == group[0] else 0
    cache.encode(new, encoder=model.load_encoder(sharded), room_for=room, own=set(own))


def _load_sharded(folder: PipelineFolder, name: str, dtype: Any, mesh: DeviceMesh) -> Any:
    """A component from the folder's files; the blocks of a text encoder are sharded."""
    component = load_component(replace(folder, loading=FROM_FILES), name, dtype)
    if isinstance(component, nn.Module):
        shard_blocks(blocks_of(component, f"shard_text_encoders: {name}"), mesh)
    return component

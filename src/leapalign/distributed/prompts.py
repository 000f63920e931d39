"""Encode a run's prompts on all ranks before training begins.

Ranks that share a cache directory share the work: each of N ranks encodes every N-th prompt of their samples, and all
read the entries. A rank with a cache of its own (another machine's disk, or memory only) encodes the prompts of its
own samples. Prompt embeds do not depend on the rest of the batch, so they equal those of one process.

Ranks synchronise after every encoder call: none waits longer than one call, and an error on one rank ends all. With
sharded text encoders (`shard_text_encoders`), which gather together, all ranks encode the same prompts.
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
    """Encode the run's prompts and free the text encoders. `reached`: by rank, the prompts that its samples need.

    A model that is not a `PipelineModel` encodes on every rank the prompts of that rank. Raises UserError if the run
    asks to shard such a model's text encoders.
    """
    if not isinstance(model, PipelineModel):
        if world.size > 1 and run.shard_text_encoders:
            raise UserError(f"shard_text_encoders: {type(run.model).__name__} encodes its prompts itself; leave it off")
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
    """Encode this rank's share of its group's prompts, then any of its own prompts that are still missing."""
    group = ranks_that_share(cache, world)
    together = list(dict.fromkeys(prompt for rank in group for prompt in needed[rank]))
    with world.agreed():
        cache.keep(together)
        share = cache.missing(together[group.index(world.rank) :: len(group)])
    _encode(cache, share, group, world)
    with world.agreed():  # entries not yet visible on a slow file system, or pruned by another run
        rest = cache.missing(needed[world.rank])
    _encode(cache, rest, [world.rank], world)


def _encode(cache: PromptCache, prompts: list[str], group: list[int], world: World) -> None:
    """Encode this rank's prompts, one encoder call at a time. The group's first busy rank frees disk space for all."""
    counts = world.gather(len(prompts))
    busy = [rank for rank in group if counts[rank]]
    calls = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    with world.agreed():  # before the others write, or their entries would be counted twice
        if busy and world.rank == busy[0]:
            cache.encode(calls.pop(0), room_for=sum(counts[rank] for rank in group))
    for turn in range(max(world.gather(len(calls)))):
        with world.agreed():
            if turn < len(calls):
                cache.encode(calls[turn])


def ranks_that_share(cache: PromptCache, world: World) -> list[int]:
    """List the ranks that use the same cache directory as this one, including itself.

    Each rank creates a marker file there, because equal paths on two machines may be different disks.
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
    """Shard text encoders while they load; all ranks encode, in the same order, any prompt that one rank lacks."""
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
    """Load a component from the folder's files; shard its blocks if it is a text encoder."""
    component = load_component(replace(folder, loading=FROM_FILES), name, dtype)
    if isinstance(component, nn.Module):
        shard_blocks(blocks_of(component, f"shard_text_encoders: {name}"), mesh)
    return component

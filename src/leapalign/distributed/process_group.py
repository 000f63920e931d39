"""Open the process group that torchrun's variables describe, and give each rank its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from leapalign.distributed.rank_rules import check_geometry
from leapalign.distributed.world import World
from leapalign.errors import RunInterrupted, RunStopped, UserError
from leapalign.run import Run

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # of one collective; longer than the longest save for which other ranks wait
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "Timed out waiting")


@contextmanager
def joined(run: Run) -> Iterator[World]:
    """Yield the world that torchrun's environment describes, with its process group open inside the block.

    An existing process group is used and left open. Raises UserError if the run's batch does not fit the ranks.
    """
    ours = not dist.is_initialized()
    world = _from_environment() if ours else _from_environment(dist.get_rank())
    check_geometry(run, world)
    if world.size == 1:
        yield world
        return
    if ours:
        _begin(run, world)
    try:
        yield world
    except RunInterrupted as end:  # agreed on, so all ranks are here
        end.elsewhere = not world.main
        if ours:
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if _is_broken(error):
            raise RunStopped(
                f"rank {world.rank}: the exchange with another rank broke off ({str(error).splitlines()[0]}); that "
                "rank has ended, and its own message says why"
            ) from error
        raise
    # after an error the group stays open until the process ends: closing it could wait for ranks that are gone
    if ours:
        dist.destroy_process_group()


def _begin(run: Run, world: World) -> None:
    """Open the process group: gloo for CPU tensors and agreement, nccl for CUDA tensors."""
    device = world_device(run.device, world)  # with the rank's index for a GPU: cuda:LOCAL_RANK
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size, timeout=TIMEOUT
    )


def _is_broken(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in BROKEN)


def _from_environment(rank: int | None = None) -> World:
    """Read torchrun's variables. Raises UserError if some are missing or are not integers in range."""
    names = VARIABLES[:4]
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    size_text = given.get("WORLD_SIZE", "1")
    if rank is None and size_text == "1":
        return World()
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"WORLD_SIZE is {size_text}, but {', '.join(missing)} is not set; start the ranks with "
            "`torchrun --nproc-per-node N -m leapalign train RECIPE`, or unset WORLD_SIZE for one process"
        )
    try:
        numbers = [int(given[name]) for name in names]
    except ValueError:
        raise UserError(f"{', '.join(f'{n}={given[n]!r}' for n in names)}: expected whole numbers") from None
    if not (0 <= numbers[0] < numbers[1] and 0 <= numbers[2] < numbers[3] <= numbers[1]):
        raise UserError(f"{', '.join(f'{n}={given[n]}' for n in names)}: expected ranks below their sizes")
    return World(rank=numbers[0], size=numbers[1], local_rank=numbers[2], local_size=numbers[3])


def world_device(name: str, world: World) -> str:
    """Return this rank's device: `auto` and `cuda` mean cuda:LOCAL_RANK. Raises UserError if ranks would share one."""
    if world.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device {name!r} would be shared by all {world.size} ranks; use cuda (one device per rank) or cpu"
        )
    there = torch.cuda.device_count()
    if world.local_rank >= there:
        raise UserError(
            f"rank {world.rank} is number {world.local_rank} on its machine, which has {there} CUDA devices; start at "
            "most that many ranks (torchrun --nproc-per-node), or use --device cpu"
        )
    return f"cuda:{world.local_rank}"


def resolve_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None
    return name

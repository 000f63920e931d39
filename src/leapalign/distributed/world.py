"""Data-parallel training over torch.distributed: the ranks of a run, started by torchrun.

Each update's batch is cut into rounds of micro_batch_size x ranks neighbouring samples, of which every rank takes a
contiguous part. Prompts, noise and draws are functions of (seed, step, sample), independent of the rank. One process
runs the same code with a `World` of size 1 and no process group.

Ranks agree on every event that changes the trajectory: a NaN, a skipped update, a signal, the time limit. A rank that
ends with an error prints it; torchrun's agent, or the broken connection, ends the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leapalign.codec import encode
from leapalign.distributed.tensors import Named
from leapalign.errors import RunInterrupted, RunStopped, UserError
from leapalign.run import Run, config_hash, nearest, nearest_multiples

Item = TypeVar("Item")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # of one collective; longer than the longest save for which other ranks wait
BUCKET = 2**26  # bytes of gradients in one all-reduce
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "Timed out waiting")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's rank and the number of ranks in the run, with the collectives that they use."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1

    @property
    def main(self) -> bool:
        """True on rank 0, the only one that writes."""
        return self.rank == 0

    def gather(self, value: Item) -> list[Item]:
        """Return every rank's value, indexed by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Item) -> Item:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first(self, value: Item | None) -> Item | None:
        """Return the value of the lowest rank whose value is not None; None if all are."""
        return next((v for v in self.gather(value) if v is not None), None)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place, in flat buckets of about BUCKET bytes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                tensor.copy_(part.view_as(tensor))

    def any(self, value: bool) -> bool:
        """Return True on every rank if the value is true on any."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextmanager
    def agreed(self, *kinds: type[Exception]) -> Iterator[None]:
        """Context that raises one rank's error on all ranks after the block; `kinds`: which errors, by default any.

        The block must hold no collective, because a rank with an error would not reach it.
        """
        own = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or (kinds and not isinstance(error, kinds)):
                raise
            own = error
        if self.any(own is not None):
            said = self.gather((type(own), str(own)) if own else None)
            first, (kind, text) = next((rank, words) for rank, words in enumerate(said) if words)
            if isinstance(own, (UserError, RunStopped)):
                own.elsewhere = first != self.rank  # the first rank with an error prints it, once
            raise own or _elsewhere(first, kind, text)

    def check_settings(self, run: Run) -> None:
        """Raise UserError unless all ranks have the same settings."""
        self._check_equal("other settings", config_hash(encode(run)))

    def check_weights(self, policy: nn.Module) -> None:
        """Raise UserError unless all ranks have bit-identical weights."""
        if self.size > 1:
            self._check_equal("other weights of the model", fingerprint(dict(policy.named_parameters())))

    def _check_equal(self, what: str, value: str) -> None:
        values = self.gather(value)
        if odd := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise UserError(f"rank {odd[0]} has {what} than rank 0; give every rank the same command and files")


def fingerprint(tensors: Named) -> str:
    """Hash names, shapes, dtypes and the exact sum of each tensor's bits: seconds for billions of weights.

    Quantised weights, whose tensor class is their library's own, count by name, shape and dtype only.
    """
    facts = [(name, list(t.shape), str(t.dtype), _bits(t.detach())) for name, t in tensors.items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _bits(tensor: Tensor) -> int:
    if type(tensor) is not Tensor:
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)) if tensor.numel() else 0


def _elsewhere(rank: int, kind: type[Exception], text: str) -> Exception:
    """Re-create another rank's error here, marked so that it is not printed again."""
    if not issubclass(kind, (UserError, RunStopped)):
        kind, text = RunStopped, f"an error of rank {rank}: {kind.__name__}: {text}"
    error = kind(text)
    error.elsewhere = True
    return error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring tensors of one dtype and device into buckets of about BUCKET bytes."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or t.device != bucket[0].device or size >= BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel() * t.element_size()
    if bucket:
        yield bucket


def sum_gradients(world: World, parameters: Mapping[str, Tensor]) -> None:
    """Sum the gradients of replicated weights over the ranks; a gradient that no rank has stays None."""
    if world.size == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters.values()], dtype=torch.int32)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    grads = []
    for p, there in zip(parameters.values(), present.tolist()):
        if there:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    world.sum_(grads)


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
        raise UserError(f"device {name!r} would be that of all {world.size} ranks; use cuda (a device a rank) or cpu")
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


def check_geometry(run: Run, world: World) -> None:
    """Raise UserError, with the nearest valid sizes, unless the batch is whole rounds of micro_batch_size x ranks."""
    batch, micro, ranks = run.batch_size, run.micro_batch_size, world.size
    if batch % (micro * ranks):
        ways = [f"batch_size {nearest_multiples(batch, micro * ranks)}"]
        if batch % ranks == 0:
            ways.append(
                f"micro_batch_size {nearest([m for m in range(1, batch + 1) if batch // ranks % m == 0], micro)}"
            )
        ways.append(f"{nearest([n for n in range(1, batch + 1) if batch // micro % n == 0], ranks)} ranks")
        raise UserError(
            f"batch_size {batch} is not made of rounds of {ranks} ranks with micro-batches of {micro}; "
            f"use {', or '.join(ways)}"
        )
    if run.sharding in ("full", "hybrid") and (why := unequal_forwards(run, world)):
        unit = micro * ranks
        raise UserError(
            f"sharding {run.sharding}: {why}; use samples_per_draw {nearest_multiples(run.samples_per_draw, unit)}, 0 "
            "for the whole batch, or sharding replicate"
        )
    if run.shard_ranks and ranks > 1 and (run.shard_ranks > ranks or ranks % run.shard_ranks):
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(
            f"shard_ranks {run.shard_ranks} does not divide {ranks} ranks; use {nearest(fits, run.shard_ranks)}"
        )


def unequal_forwards(run: Run, world: World) -> str:
    """Explain why ranks would run different numbers of forwards or backwards in a round; empty if they would not.

    Ranks with sharded weights gather each block together, so all must run it equally often.
    """
    unit = run.micro_batch_size * world.size
    if run.samples_per_draw % unit == 0:
        return ""
    causes = {
        f"the forwards of {run.method.name} depend on the draw": not run.method.same_forwards,
        f"the forwards of {run.model.name} depend on the step": not run.model.same_forwards,
        "gather_in_rollout gathers by the draw": run.gather_in_rollout,
    }
    why = " and ".join(cause for cause, applies in causes.items() if applies)
    return why and (
        f"{why}, and samples_per_draw {run.samples_per_draw} is not a multiple of the {unit} samples that "
        f"{world.size} ranks work on at a time"
    )

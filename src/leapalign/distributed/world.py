"""Several processes, one run: torchrun starts them, and this thin layer over torch.distributed keeps them together.

Each update's batch is cut into rounds of micro_batch_size x ranks neighbours, of which every rank takes its contiguous
part. Prompts, noise and draws are functions of (seed, step, sample) and so belong to no rank. One process is the same
code with a `World` of size 1 and no process group.

What must not differ between ranks is agreed on: a NaN, a skipped update, a signal, the end of the time. A rank that
ends by an error says so itself; torchrun's agent, or the broken connection, ends the others.
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
TIMEOUT = timedelta(minutes=30)  # of one exchange: longer than the longest save for which the other ranks wait
BUCKET = 2**26  # bytes of gradients in one all-reduce
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket", "Timed out waiting")


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Rank 0 writes; no other does."""
        return self.rank == 0

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Item) -> Item:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first(self, value: Item | None) -> Item | None:
        """The value of the first rank that has one."""
        return next((v for v in self.gather(value) if v is not None), None)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over the ranks, in place; a few flat buffers for many tensors."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                tensor.copy_(part.view_as(tensor))

    def any(self, value: bool) -> bool:
        """Whether the value is true on some rank; the same answer on every rank."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextmanager
    def agreed(self, *kinds: type[Exception]) -> Iterator[None]:
        """Inside, an error of these kinds (none named: any) on one rank is raised on all of them, after the block.

        The block must exchange nothing that a rank with an error would leave out.
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
        """Every rank has the same. UserError."""
        self._check_equal("other settings", config_hash(encode(run)))

    def check_weights(self, policy: nn.Module) -> None:
        """Every rank has the same, bit by bit. UserError."""
        if self.size > 1:
            self._check_equal("other weights of the model", fingerprint(dict(policy.named_parameters())))

    def _check_equal(self, what: str, value: str) -> None:
        values = self.gather(value)
        if odd := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise UserError(f"rank {odd[0]} has {what} than rank 0; give every rank the same command and files")


def fingerprint(tensors: Named) -> str:
    """A hash of names, shapes and the exact sum of the bits of each tensor: seconds for billions of weights.

    Of quantised weights, which are tensors of their library's own class, the name and shape only.
    """
    facts = [(name, list(t.shape), str(t.dtype), _bits(t.detach())) for name, t in tensors.items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _bits(tensor: Tensor) -> int:
    if type(tensor) is not Tensor:
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)) if tensor.numel() else 0


def _elsewhere(rank: int, kind: type[Exception], text: str) -> Exception:
    """Another rank's error, on a rank that has none: it takes the same way out, and leaves the saying to that rank."""
    if not issubclass(kind, (UserError, RunStopped)):
        kind, text = RunStopped, f"an error of rank {rank}: {kind.__name__}: {text}"
    error = kind(text)
    error.elsewhere = True
    return error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET bytes together."""
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
    """Replicated weights: each gradient becomes the sum over the ranks; one that no rank has stays None."""
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
    """The world that torchrun has set up in the environment, and its process group inside the block.

    A group that is there already is used and left alone. UserError where the run's geometry does not fit it.
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
    # after an error the group is left to the end of the process: tidying up could wait for ranks that are gone
    if ours:
        dist.destroy_process_group()


def _begin(run: Run, world: World) -> None:
    """gloo between CPUs, also for what is agreed on beside nccl between GPUs."""
    device = world_device(run.device, world)  # a rank's own one, with its number, where it is a GPU
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size, timeout=TIMEOUT
    )


def _is_broken(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in BROKEN)


def _from_environment(rank: int | None = None) -> World:
    """torchrun's variables. UserError where only some of them are there, or are no numbers."""
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
    """The rank's own device: `auto` and `cuda` are cuda:LOCAL_RANK. UserError where ranks would share one."""
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
    """The batch is made of whole rounds of micro_batch_size x ranks. Raises UserError with the nearest that are."""
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
    """Why the ranks of a round would make different numbers of forwards or backwards; empty where they would not.

    Ranks with sharded weights gather each block together, so every rank must run it as often as the others.
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

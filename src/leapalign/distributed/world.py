"""Data-parallel training over torch.distributed: a rank, and the collectives that ranks use.

Each update's batch is cut into rounds of micro_batch_size x ranks neighbouring samples, of which every rank takes a
contiguous part. Prompts, noise and draws are functions of (seed, step, sample), independent of the rank. One process
runs the same code with a `World` of size 1 and no process group. `process_group.py` opens the group; `rank_rules.py`
says which numbers of ranks a run can have.

Ranks agree on every event that changes the trajectory: a NaN, a skipped update, a signal, the time limit. A rank that
ends with an error prints it; torchrun's agent, or the broken connection, ends the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leapalign.codec import encode
from leapalign.distributed.tensors import Named
from leapalign.errors import RunStopped, UserError
from leapalign.run import Run, config_hash

Item = TypeVar("Item")
BUCKET = 2**26  # bytes of gradients in one all-reduce


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
        self._check_equal("different settings", config_hash(encode(run)))

    def check_weights(self, policy: nn.Module) -> None:
        """Raise UserError unless all ranks have bit-identical weights."""
        if self.size > 1:
            self._check_equal("different model weights", fingerprint(dict(policy.named_parameters())))

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

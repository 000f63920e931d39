"""Bytes of sharded networks on rank 0, which holds the largest shards: its shards, and what it gathers.

FSDP2 cuts a weight's first dimension into equal shards, the last of which may be smaller or empty, and gathers one
block at a time. While a block computes, the next one is gathered into a buffer, from which its weights are then copied;
in the backward the block's gradient is allocated as well, and a second time during its reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.distributed.choice import QUANTISED, choose, shared_by
from leapalign.distributed.fsdp import repeated_blocks
from leapalign.distributed.rank_rules import check_geometry
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.run import Run

GATHERED = 3  # copies of the largest block: the one that computes, the next one, and the next one's receive buffer
USUAL_GPU = 80 * 10**9  # bytes; assumed for a plan on a machine without GPUs


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Rank 0 of a run, and how the run shards its networks; by default the only rank."""

    world: World = field(default_factory=World)
    among: int = 1  # number of shards: ranks that share one copy of a sharded network
    sharded: bool = False  # the policy is sharded
    rounded: bool = False  # the policy's weights are gathered in bfloat16

    def policy(self, policy: nn.Module, *, trained: bool) -> int:
        """Bytes of the policy's weights on this rank; `trained`: of trained ones only, as of their gradients."""
        parts = self._parts(policy)
        return sum(size(p, parts.get(p, 1)) for p in policy.parameters() if p.requires_grad or not trained)

    def largest(self, policy: nn.Module) -> int:
        """Bytes of the largest trained weight, or shard of one, on this rank."""
        parts = self._parts(policy)
        return max((size(p, parts.get(p, 1)) for p in policy.parameters() if p.requires_grad), default=0)

    def gathered(self, policy: nn.Module) -> tuple[int, int]:
        """Return (forward, backward): peak bytes gathered in addition to the shards."""
        parts = self._parts(policy)
        if not parts:
            return 0, 0
        blocks = [{p for p in block.parameters() if p in parts} for block in repeated_blocks(policy)]
        largest, largest_summed = (max(map(size_of, blocks), default=0) for size_of in (self._in_gather, bytes_of))
        rest = [p for p in parts if not any(p in block for block in blocks)]
        forward = self._in_gather(rest) + GATHERED * largest
        if not any(p.requires_grad for p in parts):
            return forward, forward
        return forward, forward + self._in_gather(p for p in rest if p.requires_grad) + largest + largest_summed

    def received(self, policy: nn.Module, gathers: int, backwards: int) -> int:
        """Bytes that this rank receives: all weights `gathers` times, its shards' gradients `backwards` times."""
        parts = self._parts(policy)
        others = (self.among - 1) / self.among
        trained = bytes_of(p for p in parts if p.requires_grad)  # summed in float32
        return int(others * (gathers * self._in_gather(parts) + backwards * trained))

    def _in_gather(self, weights: Iterable[Tensor]) -> int:
        """Bytes of weights in the dtype in which they are gathered."""
        return sum(p.numel() * (min(2, p.element_size()) if self.rounded else p.element_size()) for p in weights)

    def frozen(self, network: nn.Module | None, blocks: Sequence[nn.Module]) -> int:
        """Bytes of a frozen network on this rank, if these of its blocks are sharded."""
        here = {p for block in blocks for p in block.parameters()}
        weights = [] if network is None else network.parameters()
        return sum(size(p, self.among if p in here else 1) for p in weights)

    def _parts(self, policy: nn.Module) -> dict[Tensor, int]:
        """Sharded weight -> number of shards. With LoRA only the frozen weights are sharded."""
        if not self.sharded:
            return {}
        weights = list(policy.parameters())
        frozen = [p for p in weights if not p.requires_grad]
        return dict.fromkeys(frozen or weights, self.among)


ALONE = Rank()


def largest_gathered(blocks: Iterable[nn.Module]) -> int:
    """Bytes gathered, in addition to the shards, while a frozen network computes."""
    return GATHERED * max((bytes_of(block.parameters()) for block in blocks), default=0)


def first_rank(
    run: Run, policy: Any, quantised: bool, device: str, memory: int, ranks: int, per_machine: int
) -> tuple[Rank, list[str]]:
    """Return rank 0 of `ranks`, and notes for the user. Raises UserError if the run does not fit the ranks.

    `memory`: the device's bytes; 0 if unknown.
    """
    if ranks == 1:
        return ALONE, []
    world, notes = world_of(run, ranks, per_machine), []
    if run.sharding == "auto" and device.startswith("cuda") and not memory:
        notes.append(f"sharding auto is decided here as on GPUs of {USUAL_GPU / 1e9:.0f} GB")
    choice = choose(run, policy, world, device, memory or USUAL_GPU)
    notes += [choice.why] if choice.why else []
    sharded = choice.sharded
    if sharded and quantised:
        if run.sharding != "auto":
            raise UserError(QUANTISED)
        sharded = False
    if sharded:
        whole = bytes_of(policy.parameters()) / 1e9
        notes.append(f"rank 0 reads the transformer whole: {whole:.1f} GB of its machine's memory while it loads")
    rounded = run.gather_dtype == "bfloat16"
    return Rank(world=world, among=shared_by(run, world), sharded=sharded, rounded=rounded), notes


def world_of(run: Run, ranks: int, per_machine: int) -> World:
    """Return the world as rank 0 sees it. Raises UserError for numbers below 1 or a batch that does not fit them."""
    if ranks < 1 or per_machine < 1:
        raise UserError(f"ranks {ranks}, ranks_per_machine {per_machine}: both must be at least 1")
    world = World(size=ranks, local_size=min(ranks, per_machine))
    check_geometry(run, world)
    return world


def size(p: Tensor, among: int) -> int:
    """Bytes of the first, largest of `among` shards of `p`."""
    rows = p.shape[0] if p.ndim else 1
    return -(-rows // among) * (p.numel() // max(rows, 1)) * p.element_size()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

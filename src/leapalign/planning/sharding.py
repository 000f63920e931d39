"""The first of several ranks, which holds the largest parts: what of each network lies on it, and what it gathers.

FSDP2 cuts a weight's first dimension into equal parts, the last of which may be smaller or empty, and gathers one block
at a time. While a block is computed the next one is being gathered, into a buffer from which its weights are then
copied; in the backward the block's gradient is there as well, and once more while it is shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.distributed.choice import QUANTISED, choose, shared_by
from leapalign.distributed.fsdp import repeated_blocks
from leapalign.distributed.world import World, check_geometry
from leapalign.errors import UserError
from leapalign.run import Run

GATHERED = 3  # of the largest block: it, the next one, and the buffer that this comes in
USUAL_GPU = 80 * 10**9  # bytes, where a plan is for GPUs that are not here


@dataclass(frozen=True, kw_only=True)
class Rank:
    """By default the only one."""

    world: World = field(default_factory=World)
    among: int = 1  # ranks that share one copy of what is sharded
    sharded: bool = False  # the policy
    rounded: bool = False  # the policy's weights are gathered in bfloat16

    def policy(self, policy: nn.Module, *, trained: bool) -> int:
        """Bytes of the policy's weights here; `trained`: only of those, and so of their gradients or of one moment."""
        parts = self._parts(policy)
        return sum(size(p, parts.get(p, 1)) for p in policy.parameters() if p.requires_grad or not trained)

    def largest(self, policy: nn.Module) -> int:
        """Bytes of the largest trained weight here."""
        parts = self._parts(policy)
        return max((size(p, parts.get(p, 1)) for p in policy.parameters() if p.requires_grad), default=0)

    def gathered(self, policy: nn.Module) -> tuple[int, int]:
        """Bytes gathered beside the parts, in a forward and in a backward."""
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
        """Bytes that this rank receives: the whole weights `gathers` times, its parts' gradients `backwards` times."""
        parts = self._parts(policy)
        others = (self.among - 1) / self.among
        trained = bytes_of(p for p in parts if p.requires_grad)  # summed in float32
        return int(others * (gathers * self._in_gather(parts) + backwards * trained))

    def _in_gather(self, weights: Iterable[Tensor]) -> int:
        """Bytes of weights as they are gathered."""
        return sum(p.numel() * (min(2, p.element_size()) if self.rounded else p.element_size()) for p in weights)

    def frozen(self, network: nn.Module | None, blocks: Sequence[nn.Module]) -> int:
        """Bytes of a frozen network here, of which these blocks are sharded."""
        here = {p for block in blocks for p in block.parameters()}
        weights = [] if network is None else network.parameters()
        return sum(size(p, self.among if p in here else 1) for p in weights)

    def _parts(self, policy: nn.Module) -> dict[Tensor, int]:
        """Weight -> how many ranks share it. Beside frozen weights the trained ones stay whole (LoRA)."""
        if not self.sharded:
            return {}
        weights = list(policy.parameters())
        frozen = [p for p in weights if not p.requires_grad]
        return dict.fromkeys(frozen or weights, self.among)


ALONE = Rank()


def largest_gathered(blocks: Iterable[nn.Module]) -> int:
    """Bytes gathered beside the parts while a frozen network computes."""
    return GATHERED * max((bytes_of(block.parameters()) for block in blocks), default=0)


def first_rank(
    run: Run, policy: Any, quantised: bool, device: str, memory: int, ranks: int, per_machine: int
) -> tuple[Rank, list[str]]:
    """Of so many; and what is to be said of it. UserError where the run does not fit the ranks.

    `memory`: bytes of the device, 0 where they are not known.
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
    """Seen from rank 0. UserError for numbers that are none, and for a batch that does not fit them."""
    if ranks < 1 or per_machine < 1:
        raise UserError(f"ranks {ranks}, ranks_per_machine {per_machine}: both must be at least 1")
    world = World(size=ranks, local_size=min(ranks, per_machine))
    check_geometry(run, world)
    return world


def size(p: Tensor, among: int) -> int:
    """Bytes of the first of so many parts."""
    rows = p.shape[0] if p.ndim else 1
    return -(-rows // among) * (p.numel() // max(rows, 1)) * p.element_size()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

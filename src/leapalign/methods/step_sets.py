"""Sets of step indices that leap: drawn at random, or so that every step occurs equally often."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def without_replacement(low: int, high: int, count: int, rng: torch.Generator) -> tuple[int, ...]:
    """Draw `count` different integers of {low..high}, every set equally likely, largest first."""
    import torch

    order = torch.randperm(high - low + 1, generator=rng, device=rng.device)
    return tuple(sorted((low + int(i) for i in order[:count]), reverse=True))


def stratified(
    first: int, last: int, leaps: int, spacing: int, count: int, rng: torch.Generator
) -> list[tuple[int, ...]]:
    """Draw `count` sets so that the steps first..last occur equally often; see `LeapAlign.draw`."""
    import torch

    sets: list[tuple[int, ...]] = []
    while len(sets) < count:
        if spacing == 1:
            order = torch.randperm(last - first + 1, generator=rng, device=rng.device).tolist()
            chunks = [order[i : i + leaps] for i in range(0, len(order) - leaps + 1, leaps)]
            sets += [tuple(sorted((first + i for i in chunk), reverse=True)) for chunk in chunks]
        else:
            starts = torch.randperm(last - first + 1 - (leaps - 1) * spacing, generator=rng, device=rng.device)
            sets += [tuple(first + s + i * spacing for i in reversed(range(leaps))) for s in starts.tolist()]
    return sets[:count]


def as_tensor(sets: list[tuple[int, ...]]) -> Tensor:
    """[number, n] long."""
    import torch

    return torch.tensor(sets)


def weighted(low: int, high: int, count: int, bias: float, rng: torch.Generator) -> tuple[int, ...]:
    """Draw `count` different integers t of {low..high}, one by one with weight (high - t + 1)^bias; largest first.

    bias 0: every set is equally likely. A larger one prefers small integers, steps at the image end.
    """
    import torch

    from_low = torch.arange(high - low + 1, 0, -1, device=rng.device, dtype=torch.float64)
    chosen = torch.multinomial(from_low**bias, count, generator=rng).tolist()
    return tuple(sorted((low + i for i in chosen), reverse=True))

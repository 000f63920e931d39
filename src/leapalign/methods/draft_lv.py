"""DRaFT-LV (arXiv 2309.17400): the last step is differentiated, then n more times from re-noised copies of x_0.

As in arXiv 2604.15311, Algorithm 1: x_1^i = (1 - sigma_1) sg(x_0) + sigma_1 eps_i, one step each, n = 2, and the 1 + n
gradients are *summed*. T + n forwards. On SD3's default grid sigma_1 is 0.0089, so the copies hardly differ from
x_0 and the gradient nearly vanishes: use a grid with a larger last step. Departures: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, euler_step, rollout
from leapalign.methods.base import Samples, Surrogate, check_positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DRaFTLVDraws(NamedTuple):
    """eps: the noise of the copies, [n, B, ...]."""

    eps: Tensor


@dataclass(frozen=True, kw_only=True)
class DRaFTLV:
    """DRaFT with less variance: several differentiated last steps a sample."""

    name: ClassVar[str] = "draft-lv"
    same_forwards: ClassVar[bool] = True

    num_copies: int = 2  # n
    """Re-noised copies of each sample beside the sample itself."""

    def __post_init__(self) -> None:
        check_positive("DRaFTLV", "num_copies", self.num_copies)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> DRaFTLVDraws:
        """Draw eps [n, B, ...], seeded per sample, so that micro-batches do not matter."""
        return DRaFTLVDraws(samples.noise(self.num_copies))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: DRaFTLVDraws) -> Surrogate:
        """Run T + n forwards, 1 + n with graph; x_hat [(1 + n) B, ...] holds x_0, then the copies."""
        eps = draws.eps.to(x)
        if eps.shape != (self.num_copies, *x.shape):
            raise UserError(f"DRaFTLV: got eps {list(eps.shape)}, expected {[self.num_copies, *x.shape]}; draw again")
        x_0 = rollout(velocity, x, sigmas, graph_steps=1)
        copies = [_last_step_again(velocity, x_0.detach(), sigmas, e) for e in eps]
        x_hat = _stack([x_0, *copies])
        return Surrogate(x_hat=x_hat, weight=x.new_ones(len(x_hat)), copies=1 + self.num_copies, x_0=x_0.detach())


def _last_step_again(velocity: Velocity, x_0: Tensor, sigmas: Tensor, eps: Tensor) -> Tensor:
    """Noise x_0 up to sigma_1 and step back (Algorithm 1, lines 44-46)."""
    x_1 = (1 - sigmas[1]) * x_0 + sigmas[1] * eps
    return euler_step(x_1, velocity(x_1, sigmas[1]), sigmas[1], sigmas[0])


def _stack(parts: list[Tensor]) -> Tensor:
    """Concatenate blocks of B rows: [B, ...] each -> [copies * B, ...]."""
    import torch

    return torch.cat(parts)

"""DRaFT-K (arXiv 2309.17400): the last K steps are differentiated as one chain, nested Jacobians included.

T forwards in total; the reward sees the chain's own x_0. Departures: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, grid_steps, rollout
from leapalign.methods.base import Samples, Surrogate, check_positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DRaFTDraws(NamedTuple):
    """Empty: DRaFT-K draws nothing."""


@dataclass(frozen=True, kw_only=True)
class DRaFT:
    """Direct reward fine-tuning, truncated to the last K steps."""

    name: ClassVar[str] = "draft-k"
    same_forwards: ClassVar[bool] = True

    num_last_steps: int = 1  # K
    """Steps at the image end that are differentiated; memory grows with it."""

    def __post_init__(self) -> None:
        check_positive("DRaFT", "num_last_steps", self.num_last_steps)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> DRaFTDraws:
        self._check(num_steps)
        return DRaFTDraws()

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: DRaFTDraws) -> Surrogate:
        """Run T forwards, the last K with graph."""
        self._check(grid_steps(sigmas, x))
        x_0 = rollout(velocity, x, sigmas, graph_steps=self.num_last_steps)
        return Surrogate(x_hat=x_0, weight=x.new_ones(len(x)), x_0=x_0.detach())

    def _check(self, num_steps: int) -> None:
        if self.num_last_steps > num_steps:
            raise UserError(
                f"DRaFT: got num_last_steps={self.num_last_steps}, but the rollout has {num_steps} steps; use "
                f"num_last_steps={num_steps} for the whole chain, or more sampling steps"
            )

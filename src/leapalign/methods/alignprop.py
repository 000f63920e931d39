"""AlignProp (arXiv 2310.03739): DRaFT's chain, truncated at a random depth per draw.

depth ~ U{0..T}; T forwards. Depth 0 has no gradient: the surrogate is marked, and the update is skipped and
counted.
Departures: the run, not the method, chooses full fine-tuning or LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, grid_steps, rollout
from leapalign.methods.base import Samples, Surrogate, uniform_integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AlignPropDraws(NamedTuple):
    """depth: number of last steps that are differentiated, 0..T."""

    depth: int


@dataclass(frozen=True, kw_only=True)
class AlignProp:
    """Randomly truncated backpropagation through the sampling chain."""

    name: ClassVar[str] = "alignprop"
    same_forwards: ClassVar[bool] = False

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> AlignPropDraws:
        """Draw depth ~ U{0..T}."""
        return AlignPropDraws(uniform_integer(0, num_steps, rng))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: AlignPropDraws) -> Surrogate:
        """Run T forwards, the last `depth` with graph; the reward sees the chain's x_0."""
        num_steps = grid_steps(sigmas, x)
        if not 0 <= draws.depth <= num_steps:
            raise UserError(f"AlignProp: got depth {draws.depth}, expected 0..{num_steps}; draw again for this grid")
        x_0 = rollout(velocity, x, sigmas, graph_steps=draws.depth)
        return Surrogate(
            x_hat=x_0, weight=x.new_ones(len(x)), x_0=x_0.detach(), metrics={"depth": x.new_full((), draws.depth)}
        )

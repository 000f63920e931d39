"""ReFL (arXiv 2304.05977): one late step is differentiated, and the reward sees the image leapt to from there.

As in arXiv 2604.15311, Algorithm 1 and App. E: t_min ~ U{1..m}, m = 11 of 25 steps, without the pre-training loss. The
rollout stops at t_min: T - t_min + 1 forwards, so equal numbers of steps are not equal compute. m scales with T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.flow.leap import leap
from leapalign.flow.rollout import Velocity, check_steps, grid_steps, rollout
from leapalign.methods.base import Samples, Surrogate, check_fraction, early_stop_range, uniform_integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ReFLDraws(NamedTuple):
    """t_min: the step, counted from the image, at which the rollout ends in a leap."""

    t_min: int


@dataclass(frozen=True, kw_only=True)
class ReFL:
    """Reward feedback learning: one differentiated step, drawn among the last ones."""

    name: ClassVar[str] = "refl"
    same_forwards: ClassVar[bool] = False

    early_stop: float = 11 / 25  # m / T
    """Share of the T steps, counted from the image, among which the early stop is drawn."""

    def __post_init__(self) -> None:
        check_fraction("ReFL", "early_stop", self.early_stop)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> ReFLDraws:
        """Draw t_min ~ U{1..m}, m = round(early_stop * T)."""
        return ReFLDraws(uniform_integer(1, early_stop_range(num_steps, self.early_stop), rng))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: ReFLDraws) -> Surrogate:
        """Run T - t_min + 1 forwards, the last with graph; the reward sees x_hat_0 leapt from t_min."""
        t = draws.t_min
        check_steps([t], grid_steps(sigmas, x))
        x = rollout(velocity, x, sigmas, stop=t)
        x_hat = leap(x, velocity(x, sigmas[t]), sigmas[t], sigmas[0])
        return Surrogate(x_hat=x_hat, weight=x.new_ones(len(x)), metrics={"t_min": x.new_full((), t)})

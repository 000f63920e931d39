"""DRTune (ECCV 2024, Wu et al., "Deep reward supervisions"): K spread steps, every model input stopped.

As in arXiv 2604.15311, Algorithm 1: steps {s + i floor(T/K)}, s ~ U{1..T - (K-1) floor(T/K)}; the velocity is always
taken at sg(x_t), so no nested Jacobian arises; the linear chain of x_t keeps its gradient; the rollout stops at t_min ~
U{1..m} and leaps to the image: T - t_min + 1 forwards. A draw with all steps below t_min has no gradient: the
surrogate is marked, and the update is skipped and counted. Departures: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.leap import leap
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import (
    Samples,
    Surrogate,
    check_fraction,
    check_positive,
    early_stop_range,
    uniform_integer,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DRTuneDraws(NamedTuple):
    """s: the lowest training step; t_min: the step at which the rollout ends in a leap."""

    s: int
    t_min: int


@dataclass(frozen=True, kw_only=True)
class DRTune:
    """Deep reward tuning: K differentiated steps with stopped inputs, and an early stop."""

    name: ClassVar[str] = "drtune"
    same_forwards: ClassVar[bool] = False

    num_training_steps: int = 2  # K
    """Differentiated steps, floor(T/K) apart."""
    early_stop: float = 11 / 25  # m / T
    """Share of the T steps, counted from the image, among which the early stop is drawn."""

    def __post_init__(self) -> None:
        check_positive("DRTune", "num_training_steps", self.num_training_steps)
        check_fraction("DRTune", "early_stop", self.early_stop)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> DRTuneDraws:
        """Draw s ~ U{1..T - (K-1) floor(T/K)}, t_min ~ U{1..m}, m = round(early_stop * T)."""
        highest = num_steps - (self.num_training_steps - 1) * self._spacing(num_steps)
        t_min = uniform_integer(1, early_stop_range(num_steps, self.early_stop), rng)
        return DRTuneDraws(s=uniform_integer(1, highest, rng), t_min=t_min)

    def training_steps(self, s: int, num_steps: int) -> tuple[int, ...]:
        """Return the training steps {s + i floor(T/K)}, i = 0..K-1 (Algorithm 1, line 5)."""
        spacing = self._spacing(num_steps)
        return tuple(s + i * spacing for i in range(self.num_training_steps))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: DRTuneDraws) -> Surrogate:
        """Run T - t_min + 1 forwards, at most K with graph; the reward sees x_hat_0 leapt from t_min."""
        num_steps = grid_steps(sigmas, x)
        train = self.training_steps(draws.s, num_steps)
        check_steps([*train, draws.t_min], num_steps)
        for t in range(num_steps, draws.t_min - 1, -1):
            # the input is stopped (line 16), the chain of states is not (line 34)
            v = velocity(x.detach(), sigmas[t]) if t in train else without_graph(velocity, x, sigmas[t])
            x = euler_step(x, v, sigmas[t], sigmas[t - 1]) if t > draws.t_min else leap(x, v, sigmas[t], sigmas[0])
        metrics = {name: x.new_full((), value) for name, value in draws._asdict().items()}
        return Surrogate(x_hat=x, weight=x.new_ones(len(x)), metrics=metrics)

    def _spacing(self, num_steps: int) -> int:
        if self.num_training_steps > num_steps:
            raise UserError(
                f"DRTune: got num_training_steps={self.num_training_steps}, but the rollout has {num_steps} steps; use "
                f"at most num_training_steps={num_steps}, or more sampling steps"
            )
        return num_steps // self.num_training_steps

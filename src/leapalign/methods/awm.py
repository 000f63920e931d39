"""AWM, advantage weighted matching (arXiv 2509.25050): the flow-matching loss of pre-training as a log-probability.

    logp = -mean_d (v(x_t) - (eps - x_0))^2,   x_t = (1 - t) x_0 + t eps,   rho = exp(logp - logp_old)
    L = mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + beta mean_d (v - v_base)^2

Samples are drawn by the ODE, without noise in its steps. On the first update after a rollout the gradient is that of
A times the flow-matching loss: good samples are matched, bad ones are left. A: the reward minus its group's mean, over
the std of the whole batch, between -1 and 1.

Departures: every time weighs alike (the authors' code has weightings to choose from); times are steps of the sampling
grid without the noise itself, as there, drawn for each sample; no second divergence from an average of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from leapalign.flow.rollout import Velocity
from leapalign.methods import forward_process
from leapalign.methods.base import Samples, check_positive
from leapalign.methods.forward_process import ForwardDraws, Noised, mean_square
from leapalign.methods.policy_gradient import Normalisation, Term, Trajectory, check_at_least, check_positive_reals
from leapalign.methods.stochastic import clipped_term

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AWM:
    """Advantage-weighted flow matching on the model's own samples; rewards need no gradient."""

    name: ClassVar[str] = "awm"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation(std="batch", eps=1e-4, correction=0)

    num_times: int = 6  # M, trained times of each sample
    kl_weight: float = 0.003  # beta
    clip_range: float = 1.0  # c; wide: the authors take one update a rollout, where nothing is clipped
    advantage_limit: float = 1.0
    same_noise: bool = False  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_positive("AWM", "num_times", self.num_times)
        check_at_least("AWM", 0, kl_weight=self.kl_weight)
        check_positive_reals("AWM", clip_range=self.clip_range, advantage_limit=self.advantage_limit)

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> ForwardDraws:
        """Draw each sample's times among the steps below the noise."""
        return forward_process.draw("AWM", 1, num_steps - 1, self.num_times, rng, samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: ForwardDraws) -> Trajectory:
        """Run T + M forwards, without graph."""
        return forward_process.roll_out(velocity, x, sigmas, draws)

    def loss(self, velocity: Velocity, base: Velocity, step: Noised, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        v = velocity(step.x, step.sigma)
        log_ratio = mean_square(step.v_old - step.target) - mean_square(v - step.target)
        term = clipped_term(advantages, log_ratio, self.clip_range)
        if not self.kl_weight:
            return term
        kl = mean_square(v - base(step.x, step.sigma))
        return replace(term, loss=term.loss + self.kl_weight * kl, metrics=term.metrics | {"kl": kl.detach()})

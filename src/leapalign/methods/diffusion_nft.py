"""DiffusionNFT (arXiv 2509.16117): good and bad samples train two velocities on either side of the old one.

    w = clip(A / 10 + 1/2, 0, 1)
    v+ = beta v + (1 - beta) v_old,   v- = (1 + beta) v_old - beta v
    x_t = (1 - t) x_0 + t eps,   x_hat_0 = x_t - t v+-
    m+- = sg max(mean_d |x_hat_0 - x_0|, 1e-5),   l+- = mean_d (x_hat_0 - x_0)^2 / m+-
    L = 5 mean (w l+ + (1 - w) l-) / beta + kl mean_d (v - v_base)^2

The old weights sample (by the ODE; the authors use no guidance) and are an average: old <- d old + (1 - d) new after
each update, with d = min(0.001 n, 0.5) after n rollouts. There is one update a rollout and no probability ratio. A: the
reward minus its group's mean, over the std of the whole batch.

Our choice: the run's averaged weights are the old ones, so they are saved, evaluated and resumed as every run's; hence
the run's own `ema_decay` is 0, and averaging over them is not offered. 10 and 5 follow `advantage_limit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.flow.leap import per_sample
from leapalign.flow.rollout import Velocity
from leapalign.methods import forward_process
from leapalign.methods.base import Samples, check_fraction
from leapalign.methods.forward_process import ForwardDraws, Noised, mean_square
from leapalign.methods.policy_gradient import Normalisation, Term, Trajectory, check_at_least, check_positive_reals

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT:
    """Negative-aware fine-tuning on the forward process; rewards need no gradient."""

    name: ClassVar[str] = "diffusion-nft"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation(std="batch", eps=1e-4, correction=0)

    beta: float = 1.0
    kl_weight: float = 1e-4
    trained_share: float = 0.99  # of the T steps, drawn for each sample: int(share T), at least 1
    decay_growth: float = 0.001  # d = min(growth n, most)
    most_decay: float = 0.5
    advantage_limit: float = 5.0
    same_noise: bool = False  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_positive_reals("DiffusionNFT", beta=self.beta, advantage_limit=self.advantage_limit)
        check_at_least("DiffusionNFT", 0, kl_weight=self.kl_weight, decay_growth=self.decay_growth)
        check_fraction("DiffusionNFT", "trained_share", self.trained_share)
        check_fraction("DiffusionNFT", "most_decay", self.most_decay)

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def average_decay(self, rollouts: int) -> float:
        return min(self.decay_growth * rollouts, self.most_decay)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> ForwardDraws:
        """Draw each sample's times among the T steps."""
        count = max(1, int(self.trained_share * num_steps))
        return forward_process.draw("DiffusionNFT", 1, num_steps, count, rng, samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: ForwardDraws) -> Trajectory:
        """Run T + M forwards, without graph; the loop gives the policy the averaged weights."""
        return forward_process.roll_out(velocity, x, sigmas, draws)

    def loss(self, velocity: Velocity, base: Velocity, step: Noised, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        v = velocity(step.x, step.sigma)
        w = (advantages.to(v) / (2 * self.advantage_limit) + 0.5).clamp(0, 1)
        good = error(step, self.beta * v + (1 - self.beta) * step.v_old)
        bad = error(step, (1 + self.beta) * step.v_old - self.beta * v)
        loss = self.advantage_limit * (w * good + (1 - w) * bad) / self.beta
        metrics = {"policy_drift": mean_square(v.detach() - step.v_old)}
        if self.kl_weight:
            kl = mean_square(v - base(step.x, step.sigma))
            loss, metrics = loss + self.kl_weight * kl, metrics | {"kl": kl.detach()}
        return Term(loss=loss, metrics=metrics)


def error(step: Noised, v: Tensor) -> Tensor:
    """Return l: the squared error of x_hat_0 over its own mean absolute error, [B]."""
    miss = step.x - per_sample(step.sigma, v) * v - step.x_0
    scale = miss.detach().abs().flatten(1).mean(1).clamp(min=1e-5)  # a constant of the loss
    return mean_square(miss) / scale

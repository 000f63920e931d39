"""Stochastic sampling steps for policy gradients (Flow-GRPO's SDE and CPS, DanceGRPO's SDE), with log-probabilities.

Each step is Gaussian: x' = mean + std z with z ~ N(0, I). With D = sigma' - sigma < 0, v = dx/dsigma:

    FlowSDE (Flow-GRPO, arXiv 2505.05470)   s = a sqrt(sigma / (1 - sigma)),   std = s sqrt(-D)
        mean = x (1 + s^2 D / (2 sigma)) + v D (1 + s^2 (1 - sigma) / (2 sigma))
    CPS (Flow-CPS, in Flow-GRPO's code)     std = sigma' sin(a pi / 2)
        mean = (1 - sigma') x_hat_0 + sqrt(sigma'^2 - std^2) x_hat_1
    DanceSDE (DanceGRPO, arXiv 2505.07818)  std = eta sqrt(-D)
        mean = x + v D - eta^2 D score / 2,   score = -(x - (1 - sigma) x_hat_0) / sigma^2

with x_hat_0 = x - sigma v and x_hat_1 = x + (1 - sigma) v. Each has the marginals of the ODE as its steps get small.

Log-probabilities are *means* over a sample's numbers, as in public code; hence the tiny clip ranges there. CPS leaves
out the constants and the variance: -mean (x' - mean)^2.

All arithmetic is in x's dtype (float32 at least). `sigma`, `sigma_next`: 0-dim or one per sample [B]. This file imports
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sin
from typing import TYPE_CHECKING, NamedTuple, Protocol

from leapalign.flow.leap import per_sample

if TYPE_CHECKING:
    from torch import Tensor


class Transition(NamedTuple):
    """The Gaussian distribution of the next state."""

    mean: Tensor  # [B, ...]
    std: Tensor  # noise of the whole step: 0-dim or [B]
    scale: Tensor  # what Flow-GRPO's KL divides by: std / sqrt(-D), for CPS std itself; 0-dim or [B]


class Kernel(Protocol):
    """A kind of stochastic step."""

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
        """Return the distribution of the state at `sigma_next`, given x [B, ...] at `sigma` with velocity v."""
        ...

    def log_prob(self, x_next: Tensor, step: Transition) -> Tensor:
        """Return the log-probability of x_next, a mean over a sample's numbers: [B]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowSDE:
    """Flow-GRPO's SDE, whose noise grows with sigma."""

    noise_level: float  # a
    largest: Tensor  # the grid's second largest sigma, which stands for 1 in the denominator of s; 0-dim

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
        v, sigma, step = v.to(x.dtype), sigma.to(x), (sigma_next.to(x) - sigma.to(x))
        below_1 = sigma.masked_fill(sigma == 1, self.largest.to(x))
        s = self.noise_level * (sigma / (1 - below_1)).sqrt()
        at_x = 1 + s.square() * step / (2 * sigma)
        at_v = step * (1 + s.square() * (1 - sigma) / (2 * sigma))
        return Transition(x * per_sample(at_x, x) + v * per_sample(at_v, x), s * (-step).sqrt(), s)

    def log_prob(self, x_next: Tensor, step: Transition) -> Tensor:
        return gaussian_log_prob(x_next, step)


@dataclass(frozen=True, kw_only=True)
class CPS:
    """Coefficients-preserving sampling: the state's noise keeps the amount that sigma' says."""

    noise_level: float  # a in [0, 1]

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
        v, sigma, sigma_next = v.to(x.dtype), sigma.to(x), sigma_next.to(x)
        std = sigma_next * sin(self.noise_level * pi / 2)
        x_hat_0, x_hat_1 = x - per_sample(sigma, x) * v, x + per_sample(1 - sigma, x) * v
        kept = (sigma_next.square() - std.square()).sqrt()
        return Transition(per_sample(1 - sigma_next, x) * x_hat_0 + per_sample(kept, x) * x_hat_1, std, std)

    def log_prob(self, x_next: Tensor, step: Transition) -> Tensor:
        return -(x_next - step.mean).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class DanceSDE:
    """DanceGRPO's SDE, of constant noise eta."""

    eta: float

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
        v, sigma, step = v.to(x.dtype), sigma.to(x), (sigma_next.to(x) - sigma.to(x))
        x_hat_0 = x - per_sample(sigma, x) * v
        score = -(x - per_sample(1 - sigma, x) * x_hat_0) / per_sample(sigma.square(), x)
        mean = x + per_sample(step, x) * (v - self.eta**2 / 2 * score)
        return Transition(mean, self.eta * (-step).sqrt(), self.eta + 0 * step)

    def log_prob(self, x_next: Tensor, step: Transition) -> Tensor:
        return gaussian_log_prob(x_next, step)


def sampled(step: Transition, z: Tensor) -> Tensor:
    """Return the next state for standard normal noise z [B, ...]."""
    return step.mean + per_sample(step.std, step.mean) * z.to(step.mean)


def gaussian_log_prob(x_next: Tensor, step: Transition) -> Tensor:
    """Return mean_d log N(x_next; mean, std^2): [B]. `std` must be positive."""
    return -distance(x_next, step.mean, step.std) - step.std.log() - log(2 * pi) / 2


def distance(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return mean_d (x - mean)^2 / (2 std^2): [B]; of two means, the KL divergence of the steps over their numbers."""
    return ((x - mean).square() / (2 * per_sample(std, x).square())).flatten(1).mean(1)

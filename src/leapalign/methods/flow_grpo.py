"""Flow-GRPO (arXiv 2505.05470): the ODE becomes an SDE with the same marginals, whose steps are a policy.

    s = a sqrt(sigma / (1 - sigma)),   x' = mean + s sqrt(-D) z,   rho = exp(logp - logp_old)
    L = mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + beta mean_d (mean - mean_base)^2 / (2 s^2)

A: reward minus its group's mean, over the std of the whole batch. All T steps are noisy and trained.

Variants, each a setting:
- `sampler` "cps": coefficients-preserving sampling (flow/sde.py), at noise_level 0.8. Its last step has no noise and is
  not trained.
- `window` n (Flow-GRPO-Fast): n neighbouring steps, at a random place of `timestep_range`, are noisy and trained; the
  others are the ODE's. With `same_noise` the samples of a prompt share everything before the window.
- `guard` (GRPO-Guard, arXiv 2510.22319): log rho has a negative mean, -KL(old, new), and a scale that differs between
  steps. With drift = mean_d (mean - mean_old)^2 / (2 s^2 (-D)), rho = exp((logp - logp_old + drift) s sqrt(-D)) has
  neither, and the loss is divided by -D, so that the steps weigh alike. Its clip range must be chosen anew.

Departures: the groups are all of one size, and an update trains whole micro-batches in the order of the batch, where
public code shuffles samples; the drift of `guard` is each sample's own, where public code takes s and D as means over
the micro-batch; public code leaves out the last step (timestep_fraction 0.99), here all noisy steps are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, grid_steps
from leapalign.flow.sde import CPS, FlowSDE, Kernel
from leapalign.methods.base import Samples, uniform_integer
from leapalign.methods.policy_gradient import (
    Normalisation,
    Term,
    Trajectory,
    check_at_least,
    check_positive_reals,
)
from leapalign.methods.stochastic import (
    Again,
    Kept,
    SDEDraws,
    again,
    clipped_term,
    draws_of,
    roll_out,
    same_steps,
    with_kl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Sampler = Literal["sde", "cps"]


@dataclass(frozen=True, kw_only=True)
class FlowGRPO:
    """Group-relative policy gradient through stochastic steps; rewards need no gradient."""

    name: ClassVar[str] = "flow-grpo"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation(std="batch", eps=1e-4, correction=0)

    noise_level: float = 0.7  # a; paper: 0.7 for SD3.5, 0.9 for FLUX.1; with cps 0.8
    sampler: Sampler = "sde"
    kl_weight: float = 0.04  # beta; paper: 0.04 for GenEval and OCR, 0.01 for PickScore, 0 for FLUX.1
    clip_range: float = 1e-4  # c
    advantage_limit: float = 5.0
    window: int = 0  # neighbouring steps that are noisy and trained; 0 = all
    timestep_range: tuple[float, float] = (0.5, 1.0)  # window: among steps t with low < t / T <= high
    guard: bool = False
    same_noise: bool = False  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_noise("FlowGRPO", self.sampler, self.noise_level)
        check_at_least("FlowGRPO", 0, kl_weight=self.kl_weight, window=self.window)
        check_positive_reals("FlowGRPO", clip_range=self.clip_range, advantage_limit=self.advantage_limit)
        low, high = self.timestep_range
        if not 0 <= low < high <= 1:
            raise UserError(f"FlowGRPO: got timestep_range={self.timestep_range}, expected 0 <= low < high <= 1")
        if self.guard and self.sampler == "cps":
            raise UserError("FlowGRPO: guard corrects a Gaussian log-probability, which cps lacks; use sampler sde")

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> SDEDraws:
        """Draw the window's place, if there is one, and the noise."""
        noisy = noisy_steps(num_steps, self.sampler)
        if self.window:
            low, high = self.timestep_range
            inside = [t for t in noisy if low * num_steps < t <= high * num_steps]
            if len(inside) < self.window:
                raise UserError(
                    f"FlowGRPO: a window of {self.window} steps does not fit the {len(inside)} noisy steps of "
                    f"timestep_range {self.timestep_range} at {num_steps} sampling steps; widen the range"
                )
            start = uniform_integer(0, len(inside) - self.window, rng)
            noisy = inside[start : start + self.window]
        return draws_of(noisy, same_steps(noisy, samples.count), samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SDEDraws) -> Trajectory:
        """Run T forwards, without graph."""
        return roll_out(velocity, x, sigmas, draws, kernel_of(self.sampler, self.noise_level, sigmas, x))

    def loss(self, velocity: Velocity, base: Velocity, step: Kept, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        new = again(velocity, step)
        if self.guard:
            term = guarded_term(step, advantages, new, self.clip_range)
        else:
            term = clipped_term(advantages, new.log_ratio, self.clip_range)
        return with_kl(term, self.kl_weight, base, step, new)


def guarded_term(step: Kept, advantages: Tensor, new: Again, clip_range: float) -> Term:
    """Return GRPO-Guard's loss: a centred and scaled log-ratio, over the step's length."""
    log_ratio = (new.log_ratio + new.drift) * new.step.std
    term = clipped_term(advantages, log_ratio, clip_range, raw=new.log_ratio)
    return replace(term, loss=term.loss / (step.sigma - step.sigma_next).to(term.loss))


def noisy_steps(num_steps: int, sampler: Sampler) -> list[int]:
    """Return the steps that can be noisy, noisiest first: all but, for cps, the last, whose noise is 0."""
    if sampler == "cps" and num_steps < 2:
        raise UserError("cps adds no noise to the last step, and there is no other; use more sampling steps")
    return list(range(num_steps, 1 if sampler == "cps" else 0, -1))


def kernel_of(sampler: Sampler, noise_level: float, sigmas: Tensor, x: Tensor) -> Kernel:
    """Return the stochastic step on this grid [T + 1]."""
    if sampler == "cps":
        return CPS(noise_level=noise_level)
    if grid_steps(sigmas, x) < 2:
        raise UserError("Flow-GRPO's noise needs a second step, whose sigma stands for 1; use more sampling steps")
    return FlowSDE(noise_level=noise_level, largest=sigmas[-2])


def check_noise(owner: str, sampler: Sampler, noise_level: float) -> None:
    check_positive_reals(owner, noise_level=noise_level)
    if sampler == "cps" and noise_level > 1:
        raise UserError(f"{owner}: got noise_level={noise_level} with sampler cps, expected (0, 1]; try 0.8")

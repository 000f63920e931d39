"""MixGRPO (arXiv 2507.21802): noise in a window of steps that moves from the noise to the image; the ODE elsewhere.

    inside the window:  Flow-GRPO's SDE and clipped loss;  A: the reward minus its group's mean, over the group's std
    outside:            Euler steps of the ODE, which are not trained

The window begins at the noise end, moves on by one step every `shift_every` rollouts and begins anew after its last
place. Several rewards are normalised each in its group, then summed with their weights.

`tail_share` (MixGRPO-Flash): the steps after the window only draw the image, so that share of them is enough, evenly
spaced, with a second-order solver (flow/multistep.py).

Departures: only the paper's formulas are used, not its code. The window always has all of its steps (its last place
ends at the image), so it is never cut. An update trains whole micro-batches in the order of the batch. `kl_weight` is
ours, 0 by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Samples, check_fraction, check_positive
from leapalign.methods.flow_grpo import Sampler, check_noise, kernel_of, noisy_steps
from leapalign.methods.policy_gradient import Normalisation, Term, Trajectory, check_at_least, check_positive_reals
from leapalign.methods.stochastic import (
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


@dataclass(frozen=True, kw_only=True)
class MixGRPO:
    """Group-relative policy gradient in a sliding window of noisy steps; rewards need no gradient."""

    name: ClassVar[str] = "mix-grpo"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation(std="group", eps=1e-8, correction=1)

    noise_level: float = 0.7  # a, of Flow-GRPO's SDE
    sampler: Sampler = "sde"
    window: int = 4  # steps with noise
    shift_every: int = 25  # rollouts at one place of the window
    tail_share: float = 1.0  # of the steps after the window that are taken; 1 = all, by Euler
    clip_range: float = 1e-4  # c
    advantage_limit: float = 5.0
    kl_weight: float = 0.0
    same_noise: bool = True  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_noise("MixGRPO", self.sampler, self.noise_level)
        check_at_least("MixGRPO", 0, kl_weight=self.kl_weight)
        check_positive("MixGRPO", "window", self.window)
        check_positive("MixGRPO", "shift_every", self.shift_every)
        check_fraction("MixGRPO", "tail_share", self.tail_share)
        check_positive_reals("MixGRPO", clip_range=self.clip_range, advantage_limit=self.advantage_limit)

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> SDEDraws:
        """Return the window of this rollout and its noise; no structure is drawn at random."""
        steps = noisy_steps(num_steps, self.sampler)
        places = len(steps) - self.window + 1
        if places < 1:
            raise UserError(
                f"MixGRPO: a window of {self.window} steps does not fit the {len(steps)} steps that can be noisy; use "
                f"window {len(steps)} or less, or more sampling steps"
            )
        place = samples.rollouts // self.shift_every % places
        noisy = steps[place : place + self.window]
        return draws_of(noisy, same_steps(noisy, samples.count), samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SDEDraws) -> Trajectory:
        """Run T forwards, or fewer with `tail_share`, without graph."""
        kernel = kernel_of(self.sampler, self.noise_level, sigmas, x)
        tail = tail_steps(draws.noisy[-1] - 1, self.tail_share) if self.tail_share < 1 else ()
        return roll_out(velocity, x, sigmas, draws, kernel, tail)

    def loss(self, velocity: Velocity, base: Velocity, step: Kept, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        new = again(velocity, step)
        return with_kl(clipped_term(advantages, new.log_ratio, self.clip_range), self.kl_weight, base, step, new)


def tail_steps(first: int, share: float) -> tuple[int, ...]:
    """Return the grid steps to visit from `first` steps before the image on, `first` and 0 included, evenly spaced."""
    count = ceil(share * first)
    return tuple(round(first * (count - i) / count) for i in range(count + 1)) if count else ()

"""DanceGRPO (arXiv 2505.07818): an SDE of constant noise, trained at a random part of its steps.

    score = -(x - (1 - sigma) x_hat_0) / sigma^2,   x' = x + v D - eta^2 D score / 2 + eta sqrt(-D) z
    L = mean max(-A rho, -A clip(rho, 1 - c, 1 + c))

A: the reward minus its group's mean, over the group's std. The samples of a prompt begin with the same noise. Of the
first T - 1 steps each sample trains a random part, int(share (T - 1)) of them, its own. The last step is the ODE's: the
reward sees x_hat_0 of the state before it, without noise, and nothing there is trained.

Departures: an update trains whole micro-batches in the order of the batch. `kl_weight` is ours (the paper has no KL
term, 0 by default): Flow-GRPO's divergence with s = eta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity
from leapalign.flow.sde import DanceSDE
from leapalign.methods.base import Samples, check_fraction
from leapalign.methods.policy_gradient import Normalisation, Term, Trajectory, check_at_least, check_positive_reals
from leapalign.methods.stochastic import Kept, SDEDraws, again, clipped_term, draws_of, roll_out, with_kl

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DanceGRPO:
    """Group-relative policy gradient with constant noise, at random steps; rewards need no gradient."""

    name: ClassVar[str] = "dance-grpo"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation(std="group", eps=1e-8, correction=1)

    eta: float = 0.3
    trained_share: float = 0.6  # of the first T - 1 steps, drawn for each sample
    clip_range: float = 1e-4  # c
    advantage_limit: float = 5.0
    kl_weight: float = 0.0
    same_noise: bool = True  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_positive_reals(
            "DanceGRPO", eta=self.eta, clip_range=self.clip_range, advantage_limit=self.advantage_limit
        )
        check_at_least("DanceGRPO", 0, kl_weight=self.kl_weight)
        check_fraction("DanceGRPO", "trained_share", self.trained_share)

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> SDEDraws:
        """Draw each sample's trained steps, and the noise of all but the last step."""
        import torch

        if num_steps < 2:
            raise UserError("DanceGRPO: the last step is not trained, and there is no other; use more sampling steps")
        count = max(1, int(self.trained_share * (num_steps - 1)))
        orders = [torch.randperm(num_steps - 1, generator=rng) for _ in range(samples.sharing or samples.count)]
        trained = torch.stack([num_steps - order[:count] for order in orders[samples.rows]], dim=1)  # of {2..T}
        return draws_of(range(num_steps, 1, -1), trained, samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SDEDraws) -> Trajectory:
        """Run T forwards, without graph."""
        return roll_out(velocity, x, sigmas, draws, DanceSDE(eta=self.eta))

    def loss(self, velocity: Velocity, base: Velocity, step: Kept, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        new = again(velocity, step)
        return with_kl(clipped_term(advantages, new.log_ratio, self.clip_range), self.kl_weight, base, step, new)

"""Flow-DPPO (arXiv 2606.11025): Flow-GRPO with a trust region by the exact divergence instead of a clipped ratio.

    drift = mean_d (mean - mean_old)^2 / (2 s^2 (-D))      the KL divergence of the Gaussian steps over their numbers
    L = mean(-A rho), without the steps of samples with drift >= threshold that move away:
        rho > 1 with A > 0, or rho < 1 with A < 0                                                           (Eq. 18)

A: the reward minus its group's mean, over the std of the whole batch. The ratio of one sampled state is a noisy
estimate of the divergence, which Gaussian steps have in closed form; a step that moves back is always trained.

Departures: none known in the loss. The threshold is that of a mean over the latent's numbers, as in the authors' code
(1e-5). `kl_weight` is Flow-GRPO's, divided by 2 s^2, where the authors' code divides by 2 s^2 (-D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Samples
from leapalign.methods.flow_grpo import FlowGRPO, Sampler
from leapalign.methods.policy_gradient import Normalisation, Term, Trajectory, check_positive_reals
from leapalign.methods.stochastic import Kept, SDEDraws, again, with_kl

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FlowDPPO:
    """Policy gradient through stochastic steps, inside a trust region by divergence; rewards need no gradient."""

    name: ClassVar[str] = "flow-dppo"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = FlowGRPO.normalisation

    threshold: float = 1e-5  # of the drift
    noise_level: float = 0.7  # a; with cps 0.8
    sampler: Sampler = "sde"
    kl_weight: float = 0.0  # beta
    advantage_limit: float = 5.0
    window: int = 0  # neighbouring steps that are noisy and trained; 0 = all
    timestep_range: tuple[float, float] = (0.5, 1.0)  # window: among steps t with low < t / T <= high
    same_noise: bool = False  # the samples of one prompt begin with the same noise

    def __post_init__(self) -> None:
        check_positive_reals("FlowDPPO", threshold=self.threshold)
        self._rollout()  # checks the settings that both share

    @property
    def needs_base(self) -> bool:
        return self.kl_weight > 0

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> SDEDraws:
        """Draw as Flow-GRPO does."""
        return self._rollout().draw(num_steps, rng, samples)

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SDEDraws) -> Trajectory:
        """Run T forwards, without graph."""
        return self._rollout().roll_out(velocity, x, sigmas, draws)

    def loss(self, velocity: Velocity, base: Velocity, step: Kept, advantages: Tensor) -> Term:
        """Run one forward with graph and, with `kl_weight`, one of the base."""
        new = again(velocity, step)
        ratio = new.log_ratio.exp()
        given = advantages.to(ratio)
        dropped = (new.drift >= self.threshold) & ((ratio - 1) * given > 0)
        metrics = {"dropped": dropped.to(ratio.detach()), "policy_drift": new.drift.detach()}
        loss = (-given * ratio).masked_fill(dropped, 0.0)
        term = Term(loss=loss, log_ratio=new.log_ratio.detach(), metrics=metrics)
        return with_kl(term, self.kl_weight, base, step, new)

    def _rollout(self) -> FlowGRPO:
        shared = {"noise_level": self.noise_level, "sampler": self.sampler, "window": self.window}
        shared |= {"timestep_range": self.timestep_range, "same_noise": self.same_noise}
        return FlowGRPO(kl_weight=self.kl_weight, advantage_limit=self.advantage_limit, **shared)

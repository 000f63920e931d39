"""Rollouts with noisy steps, kept for policy gradients; shared by Flow-GRPO, DanceGRPO, MixGRPO and Flow-DPPO.

A rollout visits grid steps from the noise to the image. Some are noisy (flow/sde.py) and can be trained: what is kept
of them is the state, the next state, the mean and the log-probability. The others are Euler steps of the ODE. A
training forward at the kept state gives the probability of the same next state under the present weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.multistep import Multistep
from leapalign.flow.rollout import Velocity, euler_step, grid_steps
from leapalign.flow.sde import Kernel, Transition, distance, sampled
from leapalign.methods.base import Samples
from leapalign.methods.policy_gradient import Term, Trajectory, clipped

if TYPE_CHECKING:
    from torch import Tensor


class SDEDraws(NamedTuple):
    """The random choices of one rollout. Steps are numbers of steps still to go: T is the first, 1 the last."""

    noisy: tuple[int, ...]  # steps with noise, noisiest first
    trained: Tensor  # [M, B] long: the steps that each sample trains, among `noisy`
    z: Tensor  # [len(noisy), B, ...]


class Kept(NamedTuple):
    """One trained step of each of B samples, as the rollout took it."""

    kernel: Kernel
    x: Tensor  # [B, ...]
    x_next: Tensor
    mean: Tensor
    log_prob: Tensor  # [B]
    sigma: Tensor
    sigma_next: Tensor


class Again(NamedTuple):
    """The same step under the present weights."""

    step: Transition
    log_ratio: Tensor  # [B] log of new over old probability of the kept next state
    drift: Tensor  # [B] KL divergence of the new step from the old one, over its numbers


def draws_of(noisy: Sequence[int], trained: Tensor, samples: Samples) -> SDEDraws:
    """Return the draws, with one noise for each noisy step."""
    return SDEDraws(tuple(noisy), trained, samples.noise(len(noisy)))


def same_steps(steps: Sequence[int], count: int) -> Tensor:
    """Return [M, B] long: all samples train these steps."""
    import torch

    return torch.tensor(steps)[:, None].expand(-1, count)


def roll_out(
    velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SDEDraws, kernel: Kernel, tail: Sequence[int] = ()
) -> Trajectory:
    """Take noisy steps by the kernel, the others by Euler, and keep the trained ones.

    `tail`: grid steps to visit after the last noisy step, by a second-order solver; empty = all, by Euler.
    """
    num_steps, found = grid_steps(sigmas, x), dict[int, Kept]()
    if not draws.noisy or not 1 <= min(draws.noisy) <= max(draws.noisy) <= num_steps:
        raise UserError(f"draws: noisy steps {draws.noisy}, expected some of 1..{num_steps}; draw again for this grid")
    for t in range(num_steps, tail[0] if tail else 0, -1):
        if t in draws.noisy:
            found[t] = noisy_step(velocity, x, sigmas, t, kernel, draws.z[draws.noisy.index(t)])
            x = found[t].x_next
        else:
            x = euler_step(x, velocity(x, sigmas[t]), sigmas[t], sigmas[t - 1])
    solver = Multistep()
    for t, after in pairwise(tail):
        x = solver(x, velocity(x, sigmas[t]), sigmas[t], sigmas[after])
    return Trajectory(x_0=x, steps=gathered(found, draws.trained))


def noisy_step(velocity: Velocity, x: Tensor, sigmas: Tensor, t: int, kernel: Kernel, z: Tensor) -> Kept:
    sigma, sigma_next = (each.expand(len(x)) for each in (sigmas[t], sigmas[t - 1]))  # as a training forward has them
    step = kernel(x, velocity(x, sigma), sigma, sigma_next)
    x_next = sampled(step, z)
    return Kept(kernel, x, x_next, step.mean, kernel.log_prob(x_next, step), sigma, sigma_next)


def gathered(found: dict[int, Kept], trained: Tensor) -> list[Kept]:
    """Return M kept steps, in each of which every sample has a step of its own."""
    return [_rows([found[t] for t in steps]) for steps in trained.tolist()]


def _rows(of_samples: list[Kept]) -> Kept:
    """Join row b of the b-th."""
    import torch

    first = of_samples[0]
    if all(each is first for each in of_samples):
        return first
    rows = [each[1:] for each in of_samples]  # without the kernel
    return Kept(first.kernel, *(torch.stack([row[i][b] for b, row in enumerate(rows)]) for i in range(len(rows[0]))))


def again(velocity: Velocity, kept: Kept) -> Again:
    """Run the velocity at the kept state, with its graph."""
    step = kept.kernel(kept.x, velocity(kept.x, kept.sigma), kept.sigma, kept.sigma_next)
    log_ratio = kept.kernel.log_prob(kept.x_next, step) - kept.log_prob
    return Again(step, log_ratio, distance(step.mean, kept.mean, step.std))


def clipped_term(advantages: Tensor, log_ratio: Tensor, clip_range: float, raw: Tensor | None = None) -> Term:
    """Return PPO's clipped loss of this log-ratio. `raw`: the log-ratio that must be 0 at first, if another one."""
    ratio = log_ratio.exp()
    loss = clipped(advantages.to(ratio), ratio, clip_range)
    outside = ((ratio.detach() - 1).abs() > clip_range).to(loss)
    return Term(loss=loss, log_ratio=(log_ratio if raw is None else raw).detach(), metrics={"clipped": outside})


def with_kl(term: Term, weight: float, base: Velocity, kept: Kept, new: Again) -> Term:
    """Add `weight` times the divergence from the base's step, mean_d (mean - mean_base)^2 / (2 s^2) (Flow-GRPO)."""
    if not weight:
        return term
    of_base = kept.kernel(kept.x, base(kept.x, kept.sigma), kept.sigma, kept.sigma_next)
    kl = distance(new.step.mean, of_base.mean, new.step.scale)
    metrics = term.metrics | {"kl": kl.detach()}
    return Term(loss=term.loss + weight * kl, log_ratio=term.log_ratio, metrics=metrics)

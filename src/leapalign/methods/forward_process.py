"""States of the forward process, for policy gradients that need no noisy steps; shared by AWM and DiffusionNFT.

A rollout by the ODE ends at x_0. At drawn times t of the grid the state is x_t = (1 - t) x_0 + t eps, with noise of its
own, and the velocity of the weights that rolled out, v_old(x_t), is kept. So the sampler may be any, and its guidance
and steps are not those of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.leap import per_sample
from leapalign.flow.rollout import Velocity, grid_steps, rollout
from leapalign.methods.base import Samples
from leapalign.methods.policy_gradient import Trajectory

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ForwardDraws(NamedTuple):
    """The random choices of one rollout: the grid steps that each sample trains, and the noise at each."""

    trained: Tensor  # [M, B] long, numbers of steps still to go
    eps: Tensor  # [M, B, ...]


class Noised(NamedTuple):
    """One trained state of each of B samples."""

    x: Tensor  # [B, ...] x_t
    sigma: Tensor  # [B] t
    x_0: Tensor  # [B, ...]
    target: Tensor  # [B, ...] eps - x_0, the velocity of the straight line
    v_old: Tensor  # [B, ...] of the weights that rolled out


def draw(owner: str, first: int, last: int, count: int, rng: torch.Generator, samples: Samples) -> ForwardDraws:
    """Draw `count` different steps of {first..last} for each sample, and their noise."""
    import torch

    if not 1 <= count <= last - first + 1:
        raise UserError(
            f"{owner}: {count} times do not fit the {last - first + 1} steps that can be trained; use more sampling "
            "steps, or train fewer times"
        )
    orders = [torch.randperm(last - first + 1, generator=rng) for _ in range(samples.sharing or samples.count)]
    trained = torch.stack([first + order[:count] for order in orders[samples.rows]], dim=1)
    return ForwardDraws(trained, samples.noise(count))


def roll_out(velocity: Velocity, x: Tensor, sigmas: Tensor, draws: ForwardDraws) -> Trajectory:
    """Run T forwards to x_0 and M more at the noised states, without graph."""
    num_steps = grid_steps(sigmas, x)
    if int(draws.trained.max()) > num_steps:
        raise UserError(f"draws: step {int(draws.trained.max())} of a grid of {num_steps}; draw again for this grid")
    x_0 = rollout(velocity, x, sigmas)
    steps = [noised(velocity, x_0, sigmas[t.to(sigmas.device)], eps.to(x_0)) for t, eps in zip(*draws)]
    return Trajectory(x_0=x_0, steps=steps)


def noised(velocity: Velocity, x_0: Tensor, sigma: Tensor, eps: Tensor) -> Noised:
    t = per_sample(sigma, x_0)
    x = (1 - t) * x_0 + t * eps
    return Noised(x, sigma, x_0, eps - x_0, velocity(x, sigma))


def mean_square(difference: Tensor) -> Tensor:
    """Return mean_d of the squares: [B, ...] -> [B]."""
    return difference.square().flatten(1).mean(1)

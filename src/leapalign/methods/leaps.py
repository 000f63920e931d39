"""Leap trajectories along a rollout (arXiv 2604.15311, Sec. 4.1): inside it, or at states that it kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from leapalign.flow.leap import connect, discount, leap, mean_distance
from leapalign.flow.rollout import Velocity, euler_step, grid_steps, without_graph
from leapalign.methods.leap_gradients import LeapGradients

if TYPE_CHECKING:
    from torch import Tensor


class LeapTrajectory(NamedTuple):
    """The two end points that the reward may see, and each leap's distance from the real state."""

    x_0: Tensor  # [B, ...] the real rollout's end, without graph
    x_hat: Tensor  # [B, ...] the last leap's prediction, with the graph of all leaps
    distances: list[Tensor]  # [B] per leap, noisiest first; the last is d_0
    gradients: LeapGradients  # at the leaps' velocities, once the backward pass has run


def leap_trajectory(
    velocity: Velocity, x: Tensor, sigmas: Tensor, steps: tuple[int, ...], alpha: float, nested_only: bool = False
) -> LeapTrajectory:
    """Roll out `x` = x_T in T forwards; those at `steps` (noisiest first) keep their graph and are joined by leaps."""
    landing = dict(zip(steps, (*steps[1:], 0)))  # k -> j -> 0
    x_hat, distances, gradients = x, [], LeapGradients(x, len(steps), nested_only)
    for t in range(grid_steps(sigmas, x), 0, -1):
        if t in landing:
            x_t = connect(x_hat, x)  # Eq. 6; before the first leap x_hat is the noise, a constant
            v = velocity(discount(x_t, alpha), sigmas[t])  # Eq. 9
            bare = x_t.detach() if nested_only and t == steps[1] else x_t  # Eq. 14: no single-step term at k
            x_hat = leap(bare, v, sigmas[t], sigmas[landing[t]])  # Eqs. 4, 5
            gradients.watch(x_hat, sigmas[t] - sigmas[landing[t]])
        else:
            v = without_graph(velocity, x, sigmas[t])
        x = euler_step(x, v.detach(), sigmas[t], sigmas[t - 1])  # the real rollout is a constant (App. G)
        if t - 1 in landing.values():
            distances.append(mean_distance(x, x_hat))  # before the connector makes them equal
    return LeapTrajectory(x, x_hat, distances, gradients)


def replayed_leaps(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    steps: Tensor,
    alpha: float,
    nested_only: bool = False,
    share: float = 1.0,
) -> list[LeapTrajectory]:
    """Roll out `x` = x_T in T forwards without graph; then join leaps at the kept states, for M sets of steps.

    `steps` [M, n, B], or [M, n, 1] if all samples leap at the same ones; noisiest first. Values and gradients are those
    of `leap_trajectory`, but a differentiated forward runs in the backward pass (`leapalign.flow.graph.recomputed`).
    `share`: factor on the anchor's gradient, 1 / M if the sets are averaged.
    """
    from leapalign.flow.graph import recomputed

    x_0, states, velocities = kept_states(velocity, x, sigmas, steps)
    starts = sigmas[steps]  # [M, n, B]
    ends = sigmas.new_zeros(starts.shape)
    ends[:, :-1] = starts[:, 1:]
    trajectories = []
    for m in range(len(steps)):
        x_hat, distances, gradients = states[m, 0], [], LeapGradients(x, steps.shape[1], nested_only)
        for i, (state, v, start, end) in enumerate(zip(states[m], velocities[m], starts[m], ends[m])):
            start, end = (time.squeeze() if len(time) == 1 else time for time in (start, end))  # 0-dim if shared
            x_t = connect(x_hat, state) if i else state
            v = recomputed(velocity, discount(x_t, alpha) if i else x_t, start, v, share)
            x_hat = leap(x_t.detach() if nested_only and i == 1 else x_t, v, start, end)
            gradients.watch(x_hat, start - end)
            distances.append(mean_distance(states[m, i + 1] if i + 1 < len(states[m]) else x_0, x_hat))
        trajectories.append(LeapTrajectory(x_0, x_hat, distances, gradients))
    return trajectories


def kept_states(velocity: Velocity, x: Tensor, sigmas: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roll out without graph; return x_0 [B, ...], and states and velocities [M, n, B, ...] at the samples' steps."""
    import torch

    kept = x.new_zeros(*steps.shape[:2], *x.shape)
    states, velocities = kept, kept
    for t in range(grid_steps(sigmas, x), 0, -1):
        v = without_graph(velocity, x, sigmas[t])
        here = (steps == t).view(*steps.shape, *[1] * (x.ndim - 1))  # without indexing, for which a GPU would wait
        states, velocities = torch.where(here, x, states), torch.where(here, v.to(x.dtype), velocities)
        x = euler_step(x, v, sigmas[t], sigmas[t - 1])
    return x, states, velocities

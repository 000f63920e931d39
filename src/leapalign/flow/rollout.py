"""The rollout: Euler steps of the probability-flow ODE from noise to image (arXiv 2604.15311, Sec. 3 and Algorithm 1).

A grid `sigmas` [T + 1] is indexed by the number of remaining steps: sigmas[0] = 0 is the image, sigmas[T] the noise.
A velocity is any callable `v(x [B, ...], sigma) -> [B, ...]`, after guidance; sigma is 0-dim, or one per sample [B] for
methods that train each sample at its own steps. Arithmetic is in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from leapalign.errors import UserError
from leapalign.flow.leap import leap

if TYPE_CHECKING:
    from torch import Tensor

Velocity: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def euler_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Take one Euler step: x_{t-1} = x_t + (sigma_{t-1} - sigma_t) v_t, the leap to the neighbouring state."""
    return leap(x, v, sigma, sigma_next)


def without_graph(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity as a constant, for steps that only move the state and are not trained."""
    import torch

    with torch.no_grad():
        return velocity(x, sigma)


def rollout(velocity: Velocity, noise: Tensor, sigmas: Tensor, graph_steps: int = 0, stop: int = 0) -> Tensor:
    """Return the state x_stop [B, ...] reached from `noise`; the last `graph_steps` of all T steps keep their graph.

    The default is plain sampling of x_0. `graph_steps = K` is DRaFT-K's truncated chain, nested Jacobians included.
    Raises UserError if `sigmas` is not an ascending grid that starts at 0.
    """
    x = noise
    for t in range(grid_steps(sigmas, noise), stop, -1):
        v = velocity(x, sigmas[t]) if t <= graph_steps else without_graph(velocity, x, sigmas[t])
        x = euler_step(x, v, sigmas[t], sigmas[t - 1])
    return x


def grid_steps(sigmas: Tensor, x: Tensor) -> int:
    """Return T, the number of steps of the grid. Raises UserError if grid or state is invalid for a rollout."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas[0] == 0) & (sigmas.diff() > 0).all()):
        raise UserError(
            f"sigmas: got {sigmas.tolist()}, expected an ascending grid [T + 1] with sigmas[0] = 0 (the image); "
            "diffusers' schedulers list the noise first: pass scheduler.sigmas.flip(0)"
        )
    if not x.is_floating_point() or x.element_size() < 4:
        raise UserError(f"x: got {x.dtype}, expected float32 (or float64); cast the noise, the model may stay bfloat16")
    return len(sigmas) - 1


def check_steps(steps: Iterable[int], num_steps: int) -> None:
    """Raise UserError for draws of another grid: a step outside {1..T} would silently get no gradient."""
    wrong = [t for t in steps if not 1 <= t <= num_steps]
    if wrong:
        raise UserError(f"draws: steps {wrong} are outside 1..{num_steps}; draw again with num_steps={num_steps}")

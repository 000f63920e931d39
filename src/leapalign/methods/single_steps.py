"""Single steps at states that the rollout kept: independent forwards, whose gradients are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from leapalign.flow.leap import connect, per_sample
from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Samples
from leapalign.methods.leaps import kept_states
from leapalign.methods.step_sets import as_tensor

if TYPE_CHECKING:
    from torch import Tensor


def replayed_steps(
    velocity: Velocity, x: Tensor, sigmas: Tensor, steps: Tensor, coefficients: Tensor, share: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """Roll out `x` = x_T in T forwards without graph; return x_0 and, for each of M sets of steps, x_0 with a gradient.

    The gradient of set m is sum_i c_mi dv(x_i): with stopped inputs, so no step knows of another. `steps` and
    `coefficients` c are [M, n, B], or [M, n, 1] if all samples share them. The n differentiated forwards run in the
    backward pass (`leapalign.flow.graph.recomputed`). `share`: factor on the anchor's gradient.
    """
    from leapalign.flow.graph import recomputed

    x_0, states, velocities = kept_states(velocity, x, sigmas, steps)
    predictions = []
    for m in range(len(steps)):
        x_hat = x_0
        for state, v, step, c in zip(states[m], velocities[m], steps[m], coefficients[m]):
            sigma = sigmas[step.squeeze() if len(step) == 1 else step]  # 0-dim if shared
            x_hat = x_hat + per_sample(c, x) * recomputed(velocity, state, sigma, v, share)
        predictions.append(connect(x_hat, x_0))
    return x_0, predictions


def each_sample(draw: Callable[[], tuple[int, ...]], samples: Samples) -> Tensor:
    """Draw n steps for every sample that shares the generator; return those of `samples`, [n, B]."""
    sets = [draw() for _ in range(samples.sharing or samples.count)]
    return as_tensor(sets)[samples.rows].T.contiguous()

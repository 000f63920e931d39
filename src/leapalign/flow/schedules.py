"""Rollouts that change the velocity between steps: another prompt's, or other weights', in some of them.

A schedule [T] names the velocity of every step, noisiest first: entry T - t is the index of the velocity at step t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, euler_step, grid_steps, without_graph

if TYPE_CHECKING:
    from torch import Tensor

Schedule: TypeAlias = tuple[int, ...]


def within(first: int, last: int, num_steps: int) -> Schedule:
    """Return the schedule with velocity 1 in steps first..last (1 is the last before the image), 0 in all others.

    `first` = `last` + 1 is the empty range. Raises UserError for a step outside 1..T.
    """
    if not 1 <= first <= last + 1 <= num_steps + 1:
        raise UserError(
            f"steps {first}-{last}: expected two of the {num_steps} sampling steps, the lower one first; {num_steps} "
            "is the noisiest, 1 the last before the image"
        )
    return tuple(int(first <= t <= last) for t in range(num_steps, 0, -1))


def scheduled_rollouts(
    velocities: Sequence[Velocity], schedules: Sequence[Schedule], noise: Tensor, sigmas: Tensor
) -> list[Tensor]:
    """Return x_0 [B, ...] of each schedule, from the same noise, without graph.

    Steps with which several schedules begin are run once: all T + 1 swaps of two velocities take T + T (T + 1) / 2
    forwards. With one velocity in all steps it is `rollout`, bit for bit.
    """
    num_steps, found = grid_steps(sigmas, noise), dict[Schedule, "Tensor"]()

    def descend(x: Tensor, begun: Schedule) -> None:
        t = num_steps - len(begun)
        if t == 0:
            found[begun] = x
            return
        for index in sorted({s[len(begun)] for s in schedules if s[: len(begun)] == begun}):
            v = without_graph(velocities[index], x, sigmas[t])
            descend(euler_step(x, v, sigmas[t], sigmas[t - 1]), (*begun, index))

    descend(noise, ())
    return [found[schedule] for schedule in schedules]

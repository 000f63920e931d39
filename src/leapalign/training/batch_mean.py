"""The anchor of the mean over a batch of several micro-batches, on one rank or several (leapalign.flow.anchor).

Its gradient at every sample holds the mean deviation from the base over the whole batch, which must be known before the
first backward. So all micro-batches are rolled out and scored first, each differentiated state is measured once, sums
and counts are added over micro-batches and ranks, and each backward has the mean as a constant. The gradient is that of
one micro-batch.

Cost: a method that differentiates in its rollout keeps the model's inputs only, whatever `Run.graph` says, if a rank
has several micro-batches, since their graphs would wait together: one forward more for each differentiated state. A
method whose forwards run in the backward pass knows v from the rollout, and its base's forward, which it needs anyway,
only runs earlier; later updates on the same rollout (`updates_per_rollout`) need one forward of v more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.distributed.world import World
from leapalign.flow.anchor import Deviation
from leapalign.flow.graph import TrainedVelocity


def share_mean(world: World, due: Sequence[tuple[TrainedVelocity, int]], like: Tensor, *, fresh: bool) -> None:
    """Set the mean of the batch at every state of the update that comes. Every rank must call it.

    `due`: each micro-batch's velocity, and the number of updates that its rollout still serves. `like`: [...], a
    latent. `fresh`: the weights are those of the rollout.
    """
    of_update = [_measured(velocity, updates, fresh) for velocity, updates in due]
    number = max(world.gather(max(map(len, of_update), default=0)))
    sums, counts = like.new_zeros(number, *like.shape), like.new_zeros(number)
    for states in of_update:
        for i, state in enumerate(states):
            assert state.difference is not None
            sums[i] += state.difference.sum(0)
            counts[i] += len(state.difference)
    if number:
        world.sum_([sums, counts])
    for states in of_update:
        for i, state in enumerate(states):
            state.mean = (sums[i] / counts[i])[None]


def _measured(velocity: TrainedVelocity, updates: int, fresh: bool) -> list[Deviation]:
    """Take this update's states from those that wait, and measure those that are not."""
    number = len(velocity.waiting) // updates  # each update on a rollout has as many
    states = [velocity.waiting.pop(0) for _ in range(number)]
    due = [(state, state.known) for state in states if state.difference is None and state.known is not None]
    with torch.no_grad():  # without sampling weights: the base is exchanged once for all states
        values = [known if fresh else velocity.velocity(state.x, state.sigma) for state, known in due]
    if due:
        velocity.measure([state for state, _ in due], values)
    return states

"""How much of a differentiated forward's graph is kept (arXiv 2604.15311, Sec. 4.2: memory, not gradient, is chosen).

Three settings, one gradient: "all" keeps everything (the plain velocity), "blocks" keeps the inputs of the model's
blocks (the model's own gradient checkpointing), "inputs" keeps only the model's inputs (`inputs_only` below).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.flow.rollout import Velocity


def inputs_only(velocity: Velocity) -> Velocity:
    """The same velocity and gradient, but only (x, sigma) are kept: the forward runs again during backward.

    The velocity must be deterministic (no dropout): the random state is not replayed.
    """

    def recomputed(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return velocity(x, sigma)
        return checkpoint(velocity, x, sigma, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    return recomputed

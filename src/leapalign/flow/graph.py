"""How much of a differentiated forward's graph is kept (arXiv 2604.15311, Sec. 4.2: memory, not gradient, is chosen).

Three settings, one gradient: "all" keeps everything (the plain velocity), "blocks" keeps the inputs of the model's
blocks (the model's own gradient checkpointing), "inputs" keeps only the model's inputs (`inputs_only` below).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.flow.rollout import Velocity


def inputs_only(velocity: Velocity) -> Velocity:
    """The same velocity and gradient, but only (x, sigma) are kept: the forward runs again during backward.

    Each forward then has a backward of its own, which adds to the weights' .grad at once. So however many leaps share
    the weights, one forward's graph is alive at a time, and no sum of the weights' gradients beside .grad: in one
    backward of several forwards autograd would hold such a sum, as large as the weights. A velocity that is made of
    several forwards (guidance) says so by `by_forward`, and they are taken one by one.

    The velocity must be deterministic (no dropout): the random state is not replayed. Its weights must be leaves, and
    the surrogate's `backward` must be used: `torch.autograd.grad` raises RuntimeError.
    """
    by_forward = getattr(velocity, "by_forward", None)
    if by_forward is not None:
        return by_forward(inputs_only)

    def recomputed(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return velocity(x, sigma)
        # a backward of its own is only made for an input with gradient; here that gradient goes nowhere
        x = x if x.requires_grad else x.detach().requires_grad_()
        return cast("Tensor", checkpoint(velocity, x, sigma, use_reentrant=True, preserve_rng_state=False))

    return recomputed

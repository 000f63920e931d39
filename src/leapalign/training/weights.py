"""The trained weights: selecting them, clipping their gradient, and their exponential moving average.

EMA: shadow <- d shadow + (1 - d) w after every update, starting at the base weights, in at least float32, for trained
weights only. The paper evaluates and releases these averages (arXiv 2604.15311, Sec. 6.1: d = 0.995).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leapalign.distributed.tensors import Named, whole
from leapalign.errors import UserError
from leapalign.run import Run


def trained_parameters(policy: nn.Module) -> Named:
    """Return name -> parameter that requires a gradient. Raises UserError if none does."""
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError(f"{type(policy).__name__}: no parameter requires a gradient; there is nothing to train")
    return parameters


def gradient_norm(parameters: Named) -> Tensor:
    """Return the gradient norm (Euclidean, over all gradients and all shards): 0-dim, at least float32."""
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(grads)) if grads else torch.zeros(())


CLIP_WINDOW = 50  # updates, whose gradient norms Run.clip_quantile looks at


def clipping_norm(run: Run, norms: list[float], norm: float) -> float:
    """Return the norm to clip this update's gradients at; 0 = no clipping. Adds `norm` to the last `norms`.

    With `clip_quantile` q it is the q-quantile of the norms of the last 50 updates, this one included, or
    `max_grad_norm`, whichever is less. Of any method's updates the share 1 - q is then clipped, whatever its loss's
    scale is, where a fixed ceiling clips half of one method's and none of another's.
    """
    if not run.clip_quantile:
        return run.max_grad_norm
    norms.append(norm)
    del norms[:-CLIP_WINDOW]
    quantile = float(torch.tensor(norms, dtype=torch.float64).quantile(run.clip_quantile))
    return min(quantile, run.max_grad_norm) if run.max_grad_norm else quantile


def clip_gradients(parameters: Named, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients to a norm of at most `max_norm`; 0 = no clipping."""
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)


class EMA:
    """The averaged copy of the trained weights."""

    def __init__(self, parameters: Named, decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.shadow = {name: _master(p.detach()).clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average: shadow <- d shadow + (1 - d) w."""
        for name, p in self.parameters.items():
            self.shadow[name].mul_(self.decay).add_(_master(p), alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the policy has the averaged weights; its own are restored bit for bit.

        Weights and averages of the same dtype are swapped, a tensor at a time, without copies in memory. Do not read
        `shadow` inside the context.
        """
        exchanged: list[tuple[Tensor, Tensor]] = []
        try:
            for name, p in self.parameters.items():
                exchanged.append((p, exchange(p, self.shadow[name])))
            yield
        finally:
            for p, kept in exchanged:
                exchange(p, kept)


@torch.no_grad()
def exchange(p: Tensor, other: Tensor) -> Tensor:
    """Copy `other` into `p`; return the tensor with p's old values: `other`, or a copy if dtypes differ."""
    own = p.clone()
    p.copy_(other)
    return other.copy_(own) if other.dtype == own.dtype else own


def _master(p: Tensor) -> Tensor:
    """Return at least float32, because 1 - d = 0.005 of a small change is lost in bfloat16."""
    return p.to(torch.promote_types(p.dtype, torch.float32))

"""Norms of the gradient at each leap's velocity, and of its single-step and nested parts (arXiv 2604.15311, Eq. 10).

With G the loss's gradient at the last prediction x_hat_0, and J_j = dv(x_j)/dx, two leaps give

    at v(x_j):  -sigma_j G
    at v(x_k):  -(sigma_k - sigma_j) G                           single-step
                +(sigma_k - sigma_j) alpha sigma_j J_j^T G       nested

In general leap i of length s_i gets -s_i times the gradient that arrives at its own prediction; the single-step part of
that is G, and the rest is nested: it has passed a velocity. Multiplied by a velocity's own Jacobian with respect to the
weights these are the terms of Eq. 10, so that their norms say how much each leap, and each part, trains.

Hooks on the predictions read all of it in the backward pass that the update runs anyway: no forward, no backward more.
The anchor's gradient, which does not reach the predictions, is not in it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class LeapGradients:
    """Norms [B] for each of n leaps, noisiest first; zero until the backward pass has run."""

    def __init__(self, x: Tensor, num_leaps: int, nested_only: bool = False) -> None:
        """`x`: [B, ...]. `nested_only`: the first leap's single-step part is cut."""
        self.single = [x.new_zeros(len(x))] * num_leaps
        self.nested = [x.new_zeros(len(x))] * (num_leaps - 1)  # the last leap has no nested part
        self.spans: list[Tensor] = []
        self.nested_only = nested_only and num_leaps > 1
        self.last: Tensor | None = None  # G, until the first leap has its gradient

    def watch(self, x_hat: Tensor, span: Tensor) -> None:
        """Measure the gradient at the next leap's prediction `x_hat`; `span`: its length in sigma, 0-dim or [B]."""
        leap = len(self.spans)
        self.spans.append(span)
        if x_hat.requires_grad:
            x_hat.register_hook(partial(self._arrived, leap))

    def _arrived(self, leap: int, grad: Tensor) -> None:
        if leap == len(self.spans) - 1:  # the last leap's gradient is the first to arrive
            self.last = grad
            norm = _norm(grad)
            self.single = [span * norm for span in self.spans]
            if self.nested_only:
                self.single[0] = norm.new_zeros(norm.shape)
        else:
            whole = self.nested_only and leap == 0
            self.nested[leap] = self.spans[leap] * _norm(grad if whole or self.last is None else grad - self.last)
        if leap == 0:
            self.last = None


def _norm(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.detach().flatten(1).norm(dim=1)

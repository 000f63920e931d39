"""DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) for rectified flow: second order with one velocity a step.

With lambda = log((1 - sigma) / sigma), h the step's length in lambda and r = h_before / h:

    D = x_hat_0 + (x_hat_0 - x_hat_0 of the step before) / (2 r)
    x' = (sigma' / sigma) x + (1 - sigma' - (1 - sigma) sigma' / sigma) D

The first step, and the one to sigma' = 0 (where h is infinite), take D = x_hat_0, which is Euler's step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from leapalign.flow.leap import leap

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Multistep:
    """Takes the steps of one rollout, each from where the last one ended."""

    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (lambda, x_hat_0) of the step before, if any

    def __call__(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Return the state at `sigma_next` from x [B, ...] at `sigma` (both 0-dim, below 1)."""
        x_hat_0, now = leap(x, v, sigma, 0 * sigma), log_ratio(sigma)
        direction = x_hat_0
        if self.before and bool(sigma_next > 0):
            earlier, x_hat_0_before = self.before[-1]
            r = (now - earlier) / (log_ratio(sigma_next) - now)
            direction = x_hat_0 + (x_hat_0 - x_hat_0_before) / (2 * r)
        self.before[:] = [(now, x_hat_0)]
        kept = sigma_next / sigma
        return kept * x + (1 - sigma_next - (1 - sigma) * kept) * direction


def log_ratio(sigma: Tensor) -> Tensor:
    """Return lambda, half the logarithm of the signal-to-noise ratio."""
    return ((1 - sigma) / sigma).log()

"""What FlowBP's surrogates Sparse, Bridge and Lagrange share (arXiv 2606.11075).

They leave the gradient of most steps out, and scale that of the active ones up to make good for a share gamma of it.
`discount(v, f)` is their f . v: the value of v, f times its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from leapalign.errors import UserError
from leapalign.methods.base import check_positive

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")


def compensation(active: Number, every: float, gamma: float) -> Number:
    """Return f = 1 + gamma (every / active - 1); `active`, `every`: sums of |D_t| over active steps, and over all."""
    return 1 + gamma * (every / active - 1)


def step_sizes(sigmas: Tensor) -> list[float]:
    """Return |D_t| = sigma_t - sigma_{t-1} for t = 0..T, with 0 for t = 0."""
    return [0.0, *sigmas.double().diff().tolist()]


def check_active(owner: str, num_training_steps: int, image_side_bias: float, compensation: float) -> None:
    """Raise UserError for impossible settings of Sparse and Bridge."""
    check_positive(owner, "num_training_steps", num_training_steps)
    if not 0 <= image_side_bias <= 100:
        raise UserError(f"{owner}: got image_side_bias={image_side_bias}, expected b in [0, 100]; the paper: 1 to 4")
    check_share(owner, "compensation", compensation, "gamma")


def check_share(owner: str, field_name: str, value: float, symbol: str) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{owner}: got {field_name}={value}, expected {symbol} in [0, 1]; leave it out for the default")


def check_enough(owner: str, num_training_steps: int, num_steps: int, fewest: int = 1) -> None:
    """Raise UserError unless a rollout of `num_steps` has `num_training_steps` active ones, and at least `fewest`."""
    if num_steps < max(num_training_steps, fewest):
        raise UserError(
            f"{owner}: got num_training_steps={num_training_steps}, but the rollout has {num_steps} steps; use at most "
            f"num_training_steps={num_steps}, or more sampling steps (at least {max(num_training_steps, fewest)})"
        )

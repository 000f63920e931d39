"""Leaps, connectors, the gradient discount and the distances of LeapAlign (arXiv 2604.15311, Eqs. 3-12, App. F).

Time runs from 1 (noise) to 0 (image). This file imports no torch: functions are arithmetic on their tensors.

Departures from the paper, in rounding only: `connect` and `discount` are written around `sg(x)`, so that their values
are those of `x` bit for bit (the paper's `x_hat + sg(x - x_hat)` has the same gradient but rounds), and `general_leap`
is Eq. 20 multiplied through, so that it has no poles at t = 0 and t = 1.
"""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, NamedTuple

from leapalign.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def leap(x: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Predict the state at time `end` from `x` at time `start` in one step of rectified flow (Eqs. 3, 21, 22).

    `x`, `v`: [B, ...]; `start`, `end`: 0-dim or one per sample [B], in [0, 1]. The result has x's dtype.
    """
    if v.shape != x.shape:
        raise UserError(f"velocity: got shape {list(v.shape)} for a state of shape {list(x.shape)}; return one v per x")
    return x - per_sample(start - end, x) * v.to(x.dtype)  # the model may run in bfloat16, the state never


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Shape a value per sample [B] so that it multiplies x [B, ...]; a 0-dim value is returned as it is."""
    return value.view(-1, *[1] * (x.ndim - 1)) if value.ndim else value


def connect(x_hat: Tensor, x: Tensor) -> Tensor:
    """Latent connector (Eqs. 6, 7): the value of the real state `x`, the gradient of its prediction `x_hat`."""
    return x.detach() + (x_hat - x_hat.detach())  # x is a constant here (App. G)


def discount(x: Tensor, alpha: float) -> Tensor:
    """Gradient discount (Eq. 9): the value of `x`, `alpha` times its gradient; only for inputs of the velocity."""
    constant = x.detach()  # the (1 - alpha) share of x that carries no gradient
    return constant + alpha * (x - constant)


def mean_distance(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return d = mean |x - x_hat| over all dimensions but the batch (above Eq. 12): [B, ...] -> [B], without graph.

    Measure it before the connector, which makes the two equal and every distance zero.
    """
    return (x.detach() - x_hat.detach()).abs().flatten(1).mean(1)  # w_sim is a constant of the loss (Eq. 13)


class Coefficients(NamedTuple):
    """A scheduler (Eq. 15: x_t = alpha_t x_0 + beta_t x_1) and its time derivatives at one time; 0-dim tensors."""

    alpha: Tensor
    beta: Tensor
    d_alpha: Tensor
    d_beta: Tensor


def linear(t: Tensor) -> Coefficients:
    """Rectified flow: alpha = 1 - t, beta = t."""
    one = t.new_ones(())
    return Coefficients(1 - t, t, -one, one)


def trigonometric(t: Tensor) -> Coefficients:
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""
    angle = pi / 2 * t
    return Coefficients(angle.cos(), angle.sin(), -pi / 2 * angle.sin(), pi / 2 * angle.cos())


def variance_preserving(t: Tensor) -> Coefficients:
    """alpha = sqrt(1 - t^2), beta = t. Its own derivative is infinite at t = 1, so leap from any t < 1."""
    alpha = (1 - t * t).sqrt()
    return Coefficients(alpha, t, -t / alpha, t.new_ones(()))


def predict_ends(x: Tensor, v: Tensor, k: Coefficients) -> tuple[Tensor, Tensor]:
    """Predict image and noise (x_hat_0, x_hat_1) from the state `x` and its velocity at time k (Eqs. 18, 19).

    Solves x = alpha x_0 + beta x_1 and v = d_alpha x_0 + d_beta x_1 (Eq. 16) by Cramer's rule, without division by
    alpha or beta.
    """
    determinant = k.d_alpha * k.beta - k.alpha * k.d_beta
    x_hat_0 = (k.beta * v - k.d_beta * x) / determinant
    x_hat_1 = (k.d_alpha * x - k.alpha * v) / determinant
    return x_hat_0, x_hat_1


def general_leap(x: Tensor, v: Tensor, k: Coefficients, j: Coefficients) -> Tensor:
    """Predict the state at time j from `x` at time k under any scheduler (Eq. 20); `leap` is its linear case."""
    x_hat_0, x_hat_1 = predict_ends(x, v, k)
    return j.alpha * x_hat_0 + j.beta * x_hat_1

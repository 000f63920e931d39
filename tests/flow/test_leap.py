"""Leaps, connector, discount and distances against closed answers and against the paper's printed equations."""

from __future__ import annotations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.leap import (
    connect,
    discount,
    general_leap,
    leap,
    linear,
    mean_distance,
    predict_ends,
    trigonometric,
    variance_preserving,
)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("schedule", [linear, trigonometric, variance_preserving])
@pytest.mark.parametrize("k, j", [(0.9, 0.2), (0.5, 0.0), (0.0, 0.5), (0.3, 0.8)])
def test_a_leap_between_two_known_ends_is_exact(schedule, k, j):
    x_0, x_1 = randn(3, 5), randn(3, 5)
    at_k, at_j = schedule(f64(k)[0]), schedule(f64(j)[0])
    x = at_k.alpha * x_0 + at_k.beta * x_1  # Eq. 15
    v = at_k.d_alpha * x_0 + at_k.d_beta * x_1  # Eq. 16
    torch.testing.assert_close(general_leap(x, v, at_k, at_j), at_j.alpha * x_0 + at_j.beta * x_1)
    torch.testing.assert_close(torch.stack(predict_ends(x, v, at_k)), torch.stack([x_0, x_1]))


@pytest.mark.parametrize("schedule", [linear, trigonometric, variance_preserving])
def test_the_form_without_poles_equals_the_printed_equation(schedule):
    x, v = randn(4, 3), randn(4, 3)
    k, j = schedule(f64(0.7)[0]), schedule(f64(0.25)[0])
    x_hat_0 = (v - k.d_beta * x / k.beta) / (k.d_alpha - k.d_beta * k.alpha / k.beta)
    x_hat_1 = (v - k.d_alpha * x / k.alpha) / (k.d_beta - k.d_alpha * k.beta / k.alpha)
    torch.testing.assert_close(general_leap(x, v, k, j), j.alpha * x_hat_0 + j.beta * x_hat_1)  # Eq. 20


@pytest.mark.parametrize("schedule", [linear, trigonometric, variance_preserving])
def test_the_derivatives_are_those_of_the_schedule(schedule):
    t = f64(0.37)[0]
    alpha, beta = torch.autograd.functional.jacobian(lambda s: torch.stack(schedule(s)[:2]), t)
    torch.testing.assert_close(torch.stack([alpha, beta]), torch.stack(schedule(t)[2:]))


@pytest.mark.parametrize("k, j", [(1.0, 0.0), (0.6, 0.25)])
def test_rectified_flow_is_the_linear_case(k, j):
    x, v, k, j = randn(2, 3), randn(2, 3), f64(k)[0], f64(j)[0]
    torch.testing.assert_close(leap(x, v, k, j), general_leap(x, v, linear(k), linear(j)))


def test_a_leap_keeps_the_states_dtype_and_refuses_another_shape():
    x = randn(2, 3, dtype=torch.float32)
    sigma = torch.tensor(0.5)
    from_bfloat16 = leap(x, x.bfloat16(), sigma, sigma / 3)
    assert torch.equal(from_bfloat16, leap(x, x.bfloat16().float(), sigma, sigma / 3))  # nothing is rounded again
    assert from_bfloat16.dtype == torch.float32
    with pytest.raises(UserError, match=r"\[2, 1\].*\[2, 3\]"):
        leap(x, x[:, :1], sigma, sigma / 2)


def test_the_connector_has_the_value_of_x_bit_for_bit_and_the_gradient_of_x_hat():
    x, x_hat = randn(1000, dtype=torch.float32), randn(1000, dtype=torch.float32).requires_grad_()
    x.requires_grad_()
    connected = connect(x_hat, x)
    assert torch.equal(connected, x)
    assert not torch.equal(x_hat + (x - x_hat).detach(), x)  # the printed form rounds
    connected.backward(torch.arange(1000.0))
    assert torch.equal(x_hat.grad, torch.arange(1000.0)) and x.grad is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_discount_scales_the_gradient_and_nothing_else(alpha):
    x = randn(1000, dtype=torch.float32).requires_grad_()
    discounted = discount(x, alpha)
    assert torch.equal(discounted, x)
    discounted.backward(torch.ones(1000))
    torch.testing.assert_close(x.grad, torch.full((1000,), alpha))


def test_the_distance_is_a_mean_per_sample_without_graph():
    x = torch.zeros(2, 2, 2)
    x_hat = torch.stack([torch.full((2, 2), -3.0), torch.tensor([[0.0, 1.0], [0.0, 1.0]])]).requires_grad_()
    distance = mean_distance(x, x_hat)
    assert distance.tolist() == [3.0, 0.5] and not distance.requires_grad

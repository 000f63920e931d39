"""Stochastic steps: against the ODE, against each other, and their log-probabilities against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from leapalign.flow.rollout import euler_step
from leapalign.flow.sde import CPS, DanceSDE, FlowSDE, distance, sampled
from small_problem import Net, grid, noise

SIGMAS = grid(8)
X, V = noise(), Net()(noise(), SIGMAS[5]).detach()
STEP = (X, V, SIGMAS[5], SIGMAS[4])


@pytest.mark.parametrize("kernel", [FlowSDE(noise_level=0, largest=SIGMAS[-2]), CPS(noise_level=0), DanceSDE(eta=0)])
def test_without_noise_each_is_the_euler_step(kernel):
    step = kernel(*STEP)
    torch.testing.assert_close(step.mean, euler_step(*STEP), rtol=1e-14, atol=1e-14)
    assert float(step.std.abs().max()) == 0


def test_both_sdes_are_one_with_another_noise():
    """DanceGRPO's mean by the score equals Flow-GRPO's, where eta is the value of s at this sigma."""
    flow = FlowSDE(noise_level=0.7, largest=SIGMAS[-2])(*STEP)
    dance = DanceSDE(eta=float(flow.scale))(*STEP)
    torch.testing.assert_close(dance.mean, flow.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dance.std, flow.std, rtol=1e-13, atol=1e-13)


def test_cps_keeps_the_amount_of_noise():
    """Both parts of the noise have, in squares, sigma' in all; and the image's part is 1 - sigma'."""
    zero = torch.zeros_like(X)
    kernel = CPS(noise_level=0.8)
    x_hat_1 = torch.ones_like(X)  # x = sigma, v = 1 has x_hat_0 = 0 and x_hat_1 = 1
    step = kernel(SIGMAS[5] * x_hat_1, x_hat_1, SIGMAS[5], SIGMAS[4])
    torch.testing.assert_close(step.mean.square() + step.std.square(), (SIGMAS[4] ** 2).expand_as(X))
    step = kernel((1 - SIGMAS[5]) * x_hat_1, -x_hat_1, SIGMAS[5], SIGMAS[4])  # x_hat_0 = 1, x_hat_1 = 0
    torch.testing.assert_close(step.mean - (1 - SIGMAS[4]), zero, rtol=0, atol=1e-14)
    last = kernel(X, V, SIGMAS[1], SIGMAS[0])
    assert float(last.std) == 0 and torch.equal(kernel.log_prob(last.mean, last), zero[:, 0])


def test_log_prob_is_the_mean_of_torchs():
    kernel = FlowSDE(noise_level=0.9, largest=SIGMAS[-2])
    step = kernel(*STEP)
    x_next = sampled(step, noise(seed=4))
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(x_next).mean(1)
    torch.testing.assert_close(kernel.log_prob(x_next, step), expected, rtol=1e-13, atol=1e-13)
    other = step._replace(mean=step.mean + 0.1)
    normals = [torch.distributions.Normal(s.mean, s.std) for s in (step, other)]
    kl = torch.distributions.kl_divergence(normals[0], normals[1]).mean(1)
    torch.testing.assert_close(distance(step.mean, other.mean, step.std), kl, rtol=1e-12, atol=1e-13)


def test_a_sigma_for_each_sample_is_each_samples_own_step():
    t = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1])
    for kernel in (FlowSDE(noise_level=0.7, largest=SIGMAS[-2]), CPS(noise_level=0.8), DanceSDE(eta=0.3)):
        step = kernel(X, V, SIGMAS[t], SIGMAS[t - 1])
        for row, k in enumerate(t.tolist()):
            alone = kernel(X[row : row + 1], V[row : row + 1], SIGMAS[k], SIGMAS[k - 1])
            torch.testing.assert_close(step.mean[row], alone.mean[0], rtol=1e-14, atol=1e-14)
            assert math.isclose(float(step.std[row]), float(alone.std), abs_tol=1e-15)

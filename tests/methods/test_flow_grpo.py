"""Flow-GRPO's variants, on a small float64 problem."""

from __future__ import annotations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.methods import FlowGRPO
from leapalign.methods.stochastic import again
from small_problem import Net, grid, noise, rng, samples

T = 8


def rolled_out(method, net, x, seed=0):
    draws = method.draw(T, rng(seed), samples())
    with torch.no_grad():
        return draws, method.roll_out(net, x, grid(T), draws)


def changed(net: Net, scale: float = 1e-2) -> Net:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng(3), dtype=p.dtype))
    return net


def test_all_steps_are_noisy_but_cps_keeps_its_last():
    assert FlowGRPO().draw(T, rng(), samples()).noisy == (8, 7, 6, 5, 4, 3, 2, 1)
    assert FlowGRPO(sampler="cps").draw(T, rng(), samples()).noisy == (8, 7, 6, 5, 4, 3, 2)


def test_the_window_is_drawn_from_its_range_and_the_rest_is_the_ode():
    method = FlowGRPO(window=2)
    windows = {method.draw(T, rng(seed), samples()).noisy for seed in range(40)}
    assert windows == {(8, 7), (7, 6), (6, 5)}
    net, x = Net(), noise()
    draws, trajectory = rolled_out(method, net, x)
    first, last = trajectory.steps
    with torch.no_grad():
        before = rollout(net, x, grid(T), stop=draws.noisy[0])
        after = rollout(net, last.x_next, grid(T)[: draws.noisy[1]])
    torch.testing.assert_close(first.x, before, rtol=0, atol=0)
    assert torch.equal(first.x_next, last.x) and len(trajectory.steps) == 2
    assert after.shape == trajectory.x_0.shape


def test_guard_centres_and_scales_the_log_ratio():
    """Second derivation: what is left is linear in the change of the mean: mean_d (x' - old) (new - old) / std."""
    net, x = Net(), noise()
    method = FlowGRPO(guard=True, kl_weight=0, clip_range=10.0)
    _, trajectory = rolled_out(method, net, x)
    net = changed(net)
    advantages = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    for kept in trajectory.steps:
        new = again(net, kept)
        std = new.step.std[:, None]
        linear = ((kept.x_next - kept.mean) * (new.step.mean - kept.mean)).mean(1) / std[:, 0]
        expected = -advantages * linear.exp() / (kept.sigma - kept.sigma_next)
        term = method.loss(net, net, kept, advantages)
        torch.testing.assert_close(term.loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(term.log_ratio, new.log_ratio.detach(), rtol=0, atol=0)


def test_the_clip_stops_what_has_gone_far_enough():
    net, x = Net(), noise()
    method = FlowGRPO(kl_weight=0)
    _, trajectory = rolled_out(method, net, x)
    net, kept = changed(net), trajectory.steps[3]
    ratio = again(net, kept).log_ratio.exp().detach()
    advantages = torch.where(ratio > 1, 1.0, -1.0).to(x.dtype)  # both push further
    term = method.loss(net, net, kept, advantages)
    far = (ratio - 1).abs() > 1e-4
    assert far.all() and torch.equal(term.metrics["clipped"], far.to(x.dtype))
    torch.testing.assert_close(term.loss, -advantages * (1 + advantages * 1e-4), rtol=1e-12, atol=0)
    term.loss.sum().backward()
    assert float(net.grads().abs().max()) == 0
    back = method.loss(net, net, kept, -advantages).loss
    torch.testing.assert_close(back, advantages * ratio, rtol=1e-12, atol=0)


def test_refusals():
    with pytest.raises(UserError, match=r"got noise_level=1\.5 with sampler cps"):
        FlowGRPO(sampler="cps", noise_level=1.5)
    with pytest.raises(UserError, match="got kl_weight=-1"):
        FlowGRPO(kl_weight=-1)
    with pytest.raises(UserError, match="expected 0 <= low < high <= 1"):
        FlowGRPO(timestep_range=(0.5, 0.5))
    with pytest.raises(UserError, match="needs a second step"):
        rolled = FlowGRPO()
        rolled.roll_out(Net(), noise(), grid(1), rolled.draw(1, rng(), samples()))

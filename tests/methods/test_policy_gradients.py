"""DanceGRPO, MixGRPO and Flow-DPPO on a small float64 problem."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.multistep import Multistep
from leapalign.flow.rollout import euler_step, rollout
from leapalign.methods import DanceGRPO, FlowDPPO, FlowGRPO, MixGRPO
from leapalign.methods.mix_grpo import tail_steps
from leapalign.methods.stochastic import again
from small_problem import Net, grid, noise, rng, samples

T = 8


def rolled_out(method, net, x, seed=0, **places):
    draws = method.draw(T, rng(seed), samples(**places))
    with torch.no_grad():
        return draws, method.roll_out(net, x, grid(T), draws)


def changed(net: Net, scale: float = 1e-2) -> Net:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng(3), dtype=p.dtype))
    return net


def test_dance_trains_a_part_of_all_but_the_last_step_of_each_sample():
    draws = [DanceGRPO().draw(T, rng(seed), samples()) for seed in range(30)]
    assert draws[0].noisy == (8, 7, 6, 5, 4, 3, 2) and draws[0].trained.shape == (4, 8)  # int(0.6 * 7)
    counts = Counter(t for d in draws for sample in d.trained.T.tolist() for t in sample)
    assert set(counts) == set(range(2, T + 1)) and min(counts.values()) > 90  # 960 / 7 = 137 each
    assert all(len(set(sample)) == 4 for d in draws for sample in d.trained.T.tolist())
    assert len({tuple(sample) for sample in draws[0].trained.T.tolist()}) > 4


def test_dance_keeps_each_samples_own_steps_and_ends_without_noise():
    net, x = Net(), noise()
    draws, trajectory = rolled_out(DanceGRPO(), net, x)
    sigmas = grid(T)
    for kept, steps in zip(trajectory.steps, draws.trained):
        torch.testing.assert_close(kept.sigma, sigmas[steps])
        torch.testing.assert_close(kept.sigma_next, sigmas[steps - 1])
    with torch.no_grad():
        _, every = rolled_out(DanceGRPO(trained_share=1.0), net, x)
    last = next((k, b) for k in every.steps for b in range(8) if float(k.sigma[b]) == float(sigmas[2]))
    state = last[0].x_next[last[1]][None]
    with torch.no_grad():
        expected = euler_step(state, net(state, sigmas[1]), sigmas[1], sigmas[0])
    torch.testing.assert_close(every.x_0[last[1]][None], expected, rtol=1e-12, atol=1e-12)


def test_mix_moves_its_window_from_the_noise_to_the_image_and_begins_anew():
    method = MixGRPO(window=3, shift_every=2)
    windows = [method.draw(T, rng(), samples(rollouts=n)).noisy for n in range(14)]
    assert windows[0] == windows[1] == (8, 7, 6) and windows[2] == (7, 6, 5)
    assert windows[10] == windows[11] == (3, 2, 1) and windows[12] == (8, 7, 6)
    assert all(len(window) == 3 for window in windows)


def test_mix_is_the_ode_outside_of_its_window():
    net, x, sigmas = Net(), noise(), grid(T)
    draws, trajectory = rolled_out(MixGRPO(window=2, shift_every=1), net, x, rollouts=3)
    assert draws.noisy == (5, 4)
    with torch.no_grad():
        assert torch.equal(trajectory.steps[0].x, rollout(net, x, sigmas, stop=5))
        y = trajectory.steps[1].x_next
        for t in (3, 2, 1):
            y = euler_step(y, net(y, sigmas[t]), sigmas[t], sigmas[t - 1])
    assert torch.equal(trajectory.x_0, y)


def test_flash_takes_fewer_steps_after_the_window():
    assert tail_steps(8, 0.5) == (8, 6, 4, 2, 0) and tail_steps(5, 0.4) == (5, 2, 0)
    assert tail_steps(1, 0.1) == (1, 0) and tail_steps(0, 0.5) == ()
    net, x = Net(), noise()
    draws, short = rolled_out(MixGRPO(window=2, tail_share=0.5), net, x)
    assert draws.noisy == (8, 7) and len(net.forwards) == 2 + 3
    net.forwards.clear()
    _, whole = rolled_out(MixGRPO(window=2), net, x)
    assert len(net.forwards) == T
    torch.testing.assert_close(short.x_0, whole.x_0, rtol=0, atol=0.2)
    _, last = rolled_out(MixGRPO(window=2, tail_share=0.5, shift_every=1), net, x, rollouts=6)
    assert torch.equal(last.x_0, last.steps[-1].x_next)  # the window ends at the image: no tail


def test_the_solver_is_of_second_order():
    """Halving the steps divides the error by about 4, Euler's by 2."""
    net = Net()
    x = noise()

    def end(step, count: int) -> torch.Tensor:
        y, times = x, torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64)
        with torch.no_grad():
            for sigma, sigma_next in pairwise(times):
                y = step(y, net(y, sigma), sigma, sigma_next)
        return y

    exact = end(euler_step, 20000)
    second = [float((end(Multistep(), n) - exact).abs().max()) for n in (20, 40)]
    first = [float((end(euler_step, n) - exact).abs().max()) for n in (20, 40)]
    assert 3.2 < second[0] / second[1] < 5 and 1.8 < first[0] / first[1] < 2.2
    assert second[1] < first[1] / 4


def test_dppo_drops_what_moves_away_beyond_its_threshold():
    """The rule of Eq. 18, sample by sample."""
    net, x = Net(), noise()
    _, trajectory = rolled_out(FlowDPPO(), net, x)
    net, kept = changed(net), trajectory.steps[2]
    new = again(net, kept)
    threshold = float(new.drift.detach().median())
    advantages = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1], dtype=x.dtype)
    term = FlowDPPO(threshold=threshold).loss(net, net, kept, advantages)
    expected = []
    for drift, ratio, a in zip(new.drift.tolist(), new.log_ratio.exp().tolist(), advantages.tolist()):
        away = (ratio > 1 and a > 0) or (ratio < 1 and a < 0)
        expected.append(0.0 if drift >= threshold and away else -a * ratio)
    torch.testing.assert_close(term.loss.detach(), torch.tensor(expected, dtype=x.dtype), rtol=1e-12, atol=0)
    assert 0 < float(term.metrics["dropped"].sum()) < 8
    s = new.step.scale * (kept.sigma - kept.sigma_next).sqrt()
    drift = ((new.step.mean - kept.mean) ** 2 / (2 * s[:, None] ** 2)).mean(1)
    torch.testing.assert_close(term.metrics["policy_drift"], drift.detach(), rtol=1e-12, atol=0)


def test_dppo_rolls_out_as_flow_grpo_does():
    net, x = Net(), noise()
    for ours, theirs in (
        (FlowDPPO(), FlowGRPO()),
        (FlowDPPO(sampler="cps", window=2), FlowGRPO(sampler="cps", window=2)),
    ):
        assert torch.equal(rolled_out(ours, net, x)[1].x_0, rolled_out(theirs, net, x)[1].x_0)


def test_refusals():
    with pytest.raises(UserError, match="MixGRPO: a window of 9 steps does not fit"):
        MixGRPO(window=9).draw(T, rng(), samples())
    with pytest.raises(UserError, match="the last step is not trained"):
        DanceGRPO().draw(1, rng(), samples())
    with pytest.raises(UserError, match="threshold=0"):
        FlowDPPO(threshold=0)
    with pytest.raises(UserError, match=r"trained_share=1\.5"):
        DanceGRPO(trained_share=1.5)

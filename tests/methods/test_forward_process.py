"""AWM and DiffusionNFT on a small float64 problem, against their formulas."""

from __future__ import annotations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.methods import AWM, DiffusionNFT
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


def gradient(loss: torch.Tensor, net: Net) -> torch.Tensor:
    loss.sum().backward()
    return net.grads()


@pytest.mark.parametrize("method", [AWM(), DiffusionNFT()], ids=lambda m: m.name)
def test_states_are_of_the_forward_process(method):
    net, x, sigmas = Net(), noise(), grid(T)
    draws, trajectory = rolled_out(method, net, x)
    with torch.no_grad():
        torch.testing.assert_close(trajectory.x_0, rollout(net, x, sigmas), rtol=0, atol=0)
        for kept, t, eps in zip(trajectory.steps, draws.trained, draws.eps, strict=True):
            at = sigmas[t][:, None]
            torch.testing.assert_close(kept.x, (1 - at) * trajectory.x_0 + at * eps, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(kept.v_old, net(kept.x, sigmas[t]), rtol=0, atol=1e-14)
    assert all(len(set(times)) == len(times) for times in draws.trained.T.tolist())
    most = T - 1 if method.name == "awm" else T
    assert draws.trained.shape == ({"awm": 6, "diffusion-nft": 7}[method.name], 8)
    assert int(draws.trained.min()) >= 1 and int(draws.trained.max()) <= most


def test_awm_begins_as_flow_matching_weighted_by_the_advantage():
    net, x = Net(), noise()
    method = AWM(kl_weight=0)
    draws, trajectory = rolled_out(method, net, x)
    advantages = torch.linspace(-1, 1, 8, dtype=x.dtype)
    kept, eps = trajectory.steps[2], draws.eps[2]
    found = gradient(method.loss(net, net, kept, advantages).loss, net)
    matching = (net(kept.x, kept.sigma) - (eps - trajectory.x_0)).square().mean(1)
    torch.testing.assert_close(found, gradient(advantages * matching, net), rtol=1e-12, atol=1e-14)


def test_awms_ratio_and_divergence_are_those_of_its_formula():
    net, x, base = Net(), noise(), Net(seed=7)
    _, trajectory = rolled_out(AWM(), net, x)
    old = Net()
    net, kept = changed(net), trajectory.steps[0]
    advantages = torch.linspace(-1, 1, 8, dtype=x.dtype)
    with torch.no_grad():
        before, after = ((n(kept.x, kept.sigma) - kept.target).square().mean(1) for n in (old, net))
        kl = (net(kept.x, kept.sigma) - base(kept.x, kept.sigma)).square().mean(1)
        ratio = (before - after).exp()
        clipped = ratio.clamp(1 - 1e-3, 1 + 1e-3)
        expected = torch.maximum(-advantages * ratio, -advantages * clipped) + 0.5 * kl
        term = AWM(clip_range=1e-3, kl_weight=0.5).loss(net, base, kept, advantages)
    torch.testing.assert_close(term.loss, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_nft_is_its_formula(beta):
    net, x, base = Net(), noise(), Net(seed=7)
    method = DiffusionNFT(beta=beta, kl_weight=0.3)
    _, trajectory = rolled_out(method, net, x)
    net, kept = changed(net, 0.1), trajectory.steps[1]
    advantages = torch.tensor([-6.0, -5, -2, 0, 1, 3, 5, 9], dtype=x.dtype)
    term = method.loss(net, base, kept, advantages)
    expected = []
    for b, a in enumerate(advantages.tolist()):
        w = min(max(a / 10 + 0.5, 0), 1)
        one, t = slice(b, b + 1), kept.sigma[b]
        v, v_old = net(kept.x[one], kept.sigma[one])[0], Net()(kept.x[one], kept.sigma[one])[0].detach()
        parts = []
        for velocity in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
            x_hat_0 = kept.x[b] - t * velocity
            scale = (x_hat_0 - trajectory.x_0[b]).abs().mean().detach()
            parts.append((x_hat_0 - trajectory.x_0[b]).square().mean() / scale)
        pull = (v - base(kept.x[one], kept.sigma[one])[0].detach()).square().mean()
        expected.append(5 * (w * parts[0] + (1 - w) * parts[1]) / beta + 0.3 * pull)
    wanted = torch.stack(expected)
    torch.testing.assert_close(term.loss, wanted, rtol=1e-10, atol=1e-12)
    whole = gradient(term.loss, net)
    wanted.sum().backward()
    # the base of this test is a constant of the loss
    torch.testing.assert_close(whole, net.grads(), rtol=1e-8, atol=1e-10)


def test_nft_has_no_gradient_where_the_advantage_is_0_and_no_weight_has_changed():
    net, x = Net(), noise()
    method = DiffusionNFT(kl_weight=0)
    _, trajectory = rolled_out(method, net, x)
    for kept in trajectory.steps:
        found = gradient(method.loss(net, net, kept, torch.zeros(8, dtype=x.dtype)).loss, net)
        assert float(found.abs().max()) < 1e-12
    pushed = gradient(method.loss(net, net, trajectory.steps[0], torch.ones(8, dtype=x.dtype)).loss, net)
    assert float(pushed.abs().max()) > 1e-3


def test_nfts_average_grows_slower():
    assert [DiffusionNFT().average_decay(n) for n in (0, 1, 100, 500, 900)] == [0, 0.001, 0.1, 0.5, 0.5]


def test_refusals():
    with pytest.raises(UserError, match="AWM: 8 times do not fit the 7 steps"):
        AWM(num_times=8).draw(T, rng(), samples())
    with pytest.raises(UserError, match=r"beta=0\.0"):
        DiffusionNFT(beta=0.0)

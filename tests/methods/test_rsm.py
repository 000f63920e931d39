"""RSM: its regression against a second derivation, its sign, its clipping over the batch, its draws and refusals."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.anchor import Anchor
from leapalign.flow.graph import with_graph
from leapalign.flow.rollout import rollout
from leapalign.methods import RSM, FlowBPSparse
from leapalign.methods.flowbp_sparse import SparseSets
from leapalign.methods.rsm import RSMDraws, anchor_weight
from small_problem import DIM, Net, grid, noise, objective, rng, samples, score

T, B, BETA = 8, 8, 3.0
CLOSE = {"rtol": 1e-10, "atol": 1e-13}
SETS = torch.tensor([[8, 6, 3, 2] * 2, [5, 4, 2, 1] * 2])  # [K, B]


def anchored(net: Net, base: Net):
    """The velocity with the anchor of RSM's beta."""

    @contextmanager
    def reference():
        own = [p.data for p in net.parameters()]
        for p, of_base in zip(net.parameters(), base.parameters()):
            p.data = of_base.data
        yield
        for p, values in zip(net.parameters(), own):
            p.data = values

    anchor = Anchor(weight=anchor_weight(BETA, DIM), reference=reference, batch_size=B)
    return with_graph(net, "all", anchor=anchor)


def reward_gradient(x_0: torch.Tensor) -> torch.Tensor:
    """g [B, ...], by hand: r = sum sin(x + row)."""
    return torch.cos(x_0 + torch.arange(len(x_0), dtype=x_0.dtype)[:, None])


def targets(base: Net, x: torch.Tensor, sigmas: torch.Tensor, net: Net) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """t -> (x_t, v_ref(x_t) - beta (1 - sigma_t) g), as the paper's formula has it."""
    g = reward_gradient(rollout(net, x, sigmas))
    states = {t: rollout(net, x, sigmas, stop=t).detach() for t in range(1, T + 1)}
    return {t: (x_t, (base(x_t, sigmas[t]) - BETA * (1 - sigmas[t]) * g).detach()) for t, x_t in states.items()}


@pytest.mark.parametrize("draws", [RSM().draw(T, rng(), samples()), RSMDraws(SETS)], ids=["all steps", "own steps"])
def test_the_gradient_is_that_of_the_regression_on_its_target(draws):
    """Second derivation: L = mean_t mean_d (v - target)^2, times the anchor's weight."""
    net, base, x, sigmas = Net(), Net(seed=4), noise(B), grid(T)
    steps = draws.steps.expand(-1, B)
    loss = torch.zeros((), dtype=x.dtype)
    for t, (x_t, target) in targets(base, x, sigmas, net).items():
        trained = (steps == t).sum(0)  # [B]
        loss = loss + (trained * (net(x_t, sigmas[t]) - target).square().mean(1)).sum() / (B * len(steps))
    (anchor_weight(BETA, DIM) * loss).backward()
    expected = net.grads()
    surrogate = RSM()(anchored(net, base), x, sigmas, draws)
    surrogate.backward(objective(surrogate).grad)
    torch.testing.assert_close(net.grads(), expected, **CLOSE)
    assert expected.abs().max() > 1e-2


def test_without_the_anchor_it_is_sparses_sum_with_other_weights():
    """Sparse's |D_t| f replaced by (1 - sigma_t) / K, step by step."""
    net, x, sigmas = Net(), noise(B), grid(T)
    expected = torch.zeros_like(net.grads())
    for t in range(1, T + 1):
        sparse = FlowBPSparse(num_training_steps=1, compensation=0.0)
        surrogate = sparse(net, x, sigmas, SparseSets(torch.full((1, 1), t)))
        surrogate.backward(objective(surrogate).grad)
        expected += (1 - sigmas[t]) / (sigmas[t] - sigmas[t - 1]) / T * net.grads()
    surrogate = RSM()(net, x, sigmas, RSM().draw(T, rng(), samples()))
    surrogate.backward(objective(surrogate).grad)
    torch.testing.assert_close(net.grads(), expected, **CLOSE)


def test_the_target_moves_the_image_up_the_reward():
    """The sign: a rollout whose velocity is a little of the way from v to RSM's target has a higher reward."""
    net, x, sigmas = Net(), noise(B), grid(T)
    x_0 = rollout(net, x, sigmas).detach()
    rewards = []
    for share in (-1e-3, 0.0, 1e-3):
        moved = x
        for t, (x_t, target) in sorted(targets(net, x, sigmas, net).items(), reverse=True):
            v = net(x_t, sigmas[t]).detach()
            moved = moved - (sigmas[t] - sigmas[t - 1]) * (v + share * (target - v))
        rewards.append(score(moved, list(range(B)))["r"])
    assert torch.allclose(rewards[1], score(x_0, list(range(B)))["r"])
    assert (rewards[0] < rewards[1]).all() and (rewards[1] < rewards[2]).all()


def test_training_on_it_raises_the_reward():
    net, x, sigmas = Net(), noise(B), grid(T)
    base, rewards = Net(), []
    for _ in range(20):
        surrogate = RSM()(anchored(net, base), x, sigmas, RSM().draw(T, rng(), samples()))
        result = objective(surrogate)
        rewards.append(float(result.reward.mean()))
        surrogate.backward(result.grad)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        net.zero_grad()
    assert rewards[-1] > rewards[0] + 0.2


def test_values_are_the_rollouts_and_nothing_is_differentiated_in_it():
    net, x, sigmas = Net(), noise(B), grid(T)
    surrogate = RSM()(net, x, sigmas, RSM().draw(T, rng(), samples()))
    assert net.forwards == [False] * T
    assert torch.equal(surrogate.x_hat, rollout(net, x, sigmas)) and torch.equal(surrogate.x_hat, surrogate.x_0)
    net.forwards.clear()
    surrogate.backward(torch.ones_like(x))
    assert net.forwards == [True] * T


def test_the_ceiling_is_a_quantile_of_the_samples_with_a_gradient():
    norms = [0.0, 5.0, 1.0, 0.0, 3.0, 2.0, 4.0]
    assert RSM(gradient_quantile=0.5).ceiling(norms) == 3.0 and RSM(gradient_quantile=1.0).ceiling(norms) == 5.0
    assert RSM().ceiling(norms) == pytest.approx(4.2) and RSM().ceiling([0.0, 0.0]) == 0.0


def test_all_steps_are_trained_or_a_share_drawn_for_each_sample():
    assert RSM().draw(5, rng(), samples()).steps.tolist() == [[5], [4], [3], [2], [1]]
    method = RSM(trained_share=0.5)
    whole = method.draw(T, rng(5), samples(count=4)).steps
    parts = [method.draw(T, rng(5), samples(count=2, first=first, sharing=4)).steps for first in (0, 2)]
    assert whole.shape == (4, 4) and torch.equal(torch.cat(parts, 1), whole)
    assert all(len(set(column.tolist())) == 4 for column in whole.T) and len({*whole.flatten().tolist()}) > 4
    assert RSM(trained_share=0.01).draw(T, rng(), samples()).steps.shape == (1, 8)


@pytest.mark.parametrize(
    "settings", [{"trained_share": 0.0}, {"gradient_quantile": 0.0}, {"gradient_quantile": 1.5}, {"trained_share": 2.0}]
)
def test_impossible_settings_are_refused(settings):
    (field,) = settings
    with pytest.raises(UserError, match=field):
        replace(RSM(), **settings)


def test_draws_of_another_grid_and_impossible_betas_are_refused():
    with pytest.raises(UserError, match="outside"):
        RSM()(Net(), noise(B), grid(T), RSMDraws(torch.tensor([[T + 1]])))
    with pytest.raises(UserError, match="expected a positive number"):
        anchor_weight(0.0, DIM)
    assert anchor_weight(1.5e7, 65536) == pytest.approx(0.0021845, rel=1e-4)

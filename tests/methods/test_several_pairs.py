"""Several pairs (k, j) a rollout, and pairs that differ between samples: against single pairs of single samples."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.graph import inputs_only, own_backward, with_graph
from leapalign.flow.rollout import rollout
from leapalign.methods import LeapAlign
from leapalign.methods.leapalign import LeapDraws, LeapSets
from leapalign.methods.objective import Hinge, latent_gradient
from small_problem import Net, grid, noise, objective, rng, samples, score, train_once

T = 8
SETS = torch.tensor(
    [[[8, 7, 5, 2], [3, 2, 4, 1]], [[6, 7, 8, 4], [5, 1, 4, 3]], [[2, 8, 3, 7], [1, 6, 2, 5]]]
)  # [3, 2, 4]


def one_by_one(method: LeapAlign, net: Net, x, sigmas, steps) -> torch.Tensor:
    """The mean over the sets of the batch's gradient, a sample and a set at a time, by the path of one set."""
    for m, b in ((m, b) for m in range(len(steps)) for b in range(len(x))):
        surrogate = method(net, x[b : b + 1], sigmas, LeapDraws(tuple(steps[m, :, b].tolist())))

        def of_sample(latents, rows, b=b):
            return score(latents, [b])

        result = latent_gradient(surrogate, of_sample, {"r": Hinge(threshold=1.5)}, batch_size=len(x))
        surrogate.backward(result.grad / len(steps))
    return net.grads()


def together(method: LeapAlign, velocity, net: Net, x, sigmas, steps) -> torch.Tensor:
    surrogate = method(velocity, x, sigmas, LeapSets(steps))
    surrogate.backward(objective(surrogate, threshold=1.5).grad)
    return net.grads()


@pytest.mark.parametrize(
    "settings",
    [{}, {"nested_scale": 1.0, "weighting": "d_j"}, {"weighting": "none"}, {"nested_only": True, "nested_scale": 0.5}],
)
@pytest.mark.parametrize("graph", ["all", "inputs", "plain"])
def test_sets_are_averaged_each_with_its_own_weights(settings, graph):
    net, x, sigmas = Net(), noise(4), grid(T)
    method = LeapAlign(pairs_per_rollout=3, step_draws="per-sample", **settings)
    velocity = net if graph == "plain" else with_graph(net, graph)
    expected = one_by_one(LeapAlign(**settings), net, x, sigmas, SETS)
    found = together(method, velocity, net, x, sigmas, SETS)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_three_leaps_in_several_sets():
    net, x, sigmas = Net(), noise(2), grid(T)
    steps = torch.tensor([[[8, 7], [5, 4], [2, 1]], [[6, 3], [4, 2], [3, 1]]])
    expected = one_by_one(LeapAlign(num_leaps=3), net, x, sigmas, steps)
    found = together(LeapAlign(num_leaps=3, pairs_per_rollout=2), net, net, x, sigmas, steps)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"nested_only": True}, {"reward_input": "x_hat"}, {"num_leaps": 1}])
def test_one_shared_set_is_the_papers_bit_for_bit(settings, dtype):
    net, x, sigmas, method = Net(dtype), noise(dtype=dtype), grid(T, dtype), LeapAlign(**settings)
    steps = (6, 3)[: method.num_leaps]
    paper = method(net, x, sigmas, LeapDraws(steps))
    kept = method(net, x, sigmas, LeapSets(torch.tensor(steps).view(1, -1, 1)))
    assert torch.equal(paper.x_hat, kept.x_hat) and torch.equal(paper.weight, kept.weight)
    assert {name: value.tolist() for name, value in paper.metrics.items()} == {
        name: value.tolist() for name, value in kept.metrics.items()
    }
    expected = train_once(method, net, x, sigmas, LeapDraws(steps), inputs_only(net))
    found = method(net, x, sigmas, LeapSets(torch.tensor(steps).view(1, -1, 1)))
    found.backward(objective(found).grad)
    assert torch.equal(net.grads(), expected)


def test_the_reward_sees_the_rollouts_image_bit_for_bit():
    net, x, sigmas = Net(torch.float32), noise(4, torch.float32), grid(T, torch.float32)
    surrogate = LeapAlign(pairs_per_rollout=3)(net, x, sigmas, LeapSets(SETS))
    assert torch.equal(surrogate.x_hat, rollout(net, x, sigmas)) and torch.equal(surrogate.x_0, surrogate.x_hat)


def test_forwards_are_t_without_graph_and_one_for_each_leap_in_the_backward():
    net = Net()
    surrogate = LeapAlign(pairs_per_rollout=3)(net, noise(4), grid(T), LeapSets(SETS))
    assert net.forwards == [False] * T
    surrogate.backward(torch.ones(4, 4, dtype=torch.float64))
    assert net.forwards == [False] * T + [True] * 6


def test_only_states_are_kept():
    """No activation of the network: its hidden layer is wider than the state, and no saved tensor is as wide."""
    net, widths = Net(), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: widths.add(t.shape[-1:]) or t, lambda t: t):
        LeapAlign(pairs_per_rollout=3)(net, noise(4), grid(T), LeapSets(SETS))
    assert torch.Size([6]) not in widths
    with torch.autograd.graph.saved_tensors_hooks(lambda t: widths.add(t.shape[-1:]) or t, lambda t: t):
        LeapAlign()(own_backward(net), noise(4), grid(T), LeapDraws((6, 3)))
    assert torch.Size([6]) in widths  # where the graph is kept, they would be seen


# Draws


def drawn(method: LeapAlign, count: int, seed: int = 0, num_steps: int = T, **places) -> torch.Tensor:
    return method.draw(num_steps, rng(seed), samples(count=count, **places)).steps


@pytest.mark.parametrize("pairs", [1, 3])
def test_shared_sets_are_one_for_all_samples(pairs):
    steps = drawn(LeapAlign(pairs_per_rollout=pairs), 5)
    if pairs == 1:
        assert isinstance(steps, tuple)  # the paper's draw: T forwards, with the graph inside the rollout
    else:
        assert steps.shape == (pairs, 2, 1) and bool((steps[:, 0] > steps[:, 1]).all())


@pytest.mark.parametrize("draws", ["per-sample", "stratified"])
def test_draws_do_not_depend_on_micro_batches(draws):
    method = LeapAlign(pairs_per_rollout=3, step_draws=draws)
    whole = drawn(method, 8)
    parts = [drawn(method, 2, first=first, sharing=8) for first in (0, 2, 4, 6)]
    assert torch.equal(whole, torch.cat(parts, -1)) and whole.shape == (3, 2, 8)


@pytest.mark.parametrize("draws", ["per-sample", "stratified"])
@pytest.mark.parametrize("settings", [{}, {"timestep_range": (0.5, 1.0)}, {"leap_distance": 0.25}])
def test_every_pair_is_equally_likely(draws, settings):
    method = LeapAlign(step_draws=draws, **settings)
    first, last, spacing = method._range(T)
    pairs = Counter(tuple(pair) for pair in drawn(method, 20_000)[0].T.tolist())
    apart = {"leap_distance"} & settings.keys()
    allowed = [(k, j) for j, k in combinations(range(first, last + 1), 2) if not apart or k - j == spacing]
    assert set(pairs) == set(allowed)
    assert max(pairs.values()) < 1.2 * 20_000 / len(allowed)


def test_stratified_pairs_have_each_step_equally_often():
    steps = drawn(LeapAlign(pairs_per_rollout=2, step_draws="stratified"), 8)  # 16 pairs of 8 steps: 4 rounds
    assert set(Counter(steps.flatten().tolist()).values()) == {4}


def test_several_pairs_need_the_reward_of_x_0():
    with pytest.raises(UserError, match="several pairs share the reward of x_0"):
        LeapAlign(pairs_per_rollout=2, reward_input="x_hat")
    with pytest.raises(UserError, match="pairs_per_rollout"):
        LeapAlign(pairs_per_rollout=0)
    with pytest.raises(UserError, match="step_draws"):
        LeapAlign(step_draws="own")  # type: ignore[arg-type]

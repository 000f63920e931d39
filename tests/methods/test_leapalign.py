"""LeapAlign against second derivations: explicit Jacobians (Eqs. 8, 10, 14), DRaFT-n, stopped inputs, weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from leapalign.errors import UserError
from leapalign.flow.leap import leap
from leapalign.flow.rollout import rollout
from leapalign.methods import DRaFT, LeapAlign
from leapalign.methods.draft import DRaFTDraws
from leapalign.methods.leapalign import LeapDraws, similarity_weight
from small_problem import Net, grid, noise, objective, rng, samples, train_once

T, K, J = 8, 6, 3


def jacobian_terms(net, x, sigmas, k, j):
    """dv(x_j)/dtheta and dv(x_k)/dtheta [B, d, P], dv(x_j)/dx [B, d, d], at the real states."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x_k, x_j = (rollout(net, x, sigmas, stop=t) for t in (k, j))

    def v(weights, row, sigma):
        return functional_call(net, weights, (row, sigma))

    def theta(state, sigma):
        jacobians = vmap(jacrev(v), in_dims=(None, 0, None))(parameters, state, sigma)
        return torch.cat([jacobians[name].flatten(2) for name in parameters], -1)

    by_x = vmap(jacrev(v, argnums=1), in_dims=(None, 0, None))(parameters, x_j, sigmas[j])
    return theta(x_j, sigmas[j]), theta(x_k, sigmas[k]), by_x


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nested_only", [False, True], ids=["Eq. 10", "Eq. 14"])
@pytest.mark.parametrize("reward_input", ["x_0", "x_hat"])
def test_autograd_equals_the_printed_gradient(alpha, nested_only, reward_input):
    net, x, sigmas = Net(), noise(), grid(T)
    at_j, at_k, by_x = jacobian_terms(net, x, sigmas, K, J)
    k, j = sigmas[K], sigmas[J]
    dx_0 = -j * at_j + alpha * j * (k - j) * by_x @ at_k
    if not nested_only:
        dx_0 = dx_0 - (k - j) * at_k
    method = LeapAlign(nested_scale=alpha, nested_only=nested_only, reward_input=reward_input)
    surrogate = method(net, x, sigmas, LeapDraws((K, J)))
    g = torch.randn_like(x)
    surrogate.backward(g)
    torch.testing.assert_close(net.grads(), torch.einsum("bd,bdp->p", g, dx_0), rtol=1e-10, atol=1e-12)


def test_the_discount_leaves_the_bare_states_gradient_whole():
    net, x, sigmas = Net(), noise(), grid(T)
    at_j, at_k, _ = jacobian_terms(net, x, sigmas, K, J)
    LeapAlign(nested_scale=0.0)(net, x, sigmas, LeapDraws((K, J))).backward(torch.ones_like(x))
    single_steps = -sigmas[J] * at_j - (sigmas[K] - sigmas[J]) * at_k
    torch.testing.assert_close(net.grads(), single_steps.sum((0, 1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [(6, 3), (8, 1), (7, 4, 2), (8, 6, 3, 1)])
def test_alpha_0_equals_a_stopped_input(steps):
    net, x, sigmas = Net(), noise(), grid(T)
    alpha_0 = LeapAlign(num_leaps=len(steps), nested_scale=0.0)
    alpha_1 = LeapAlign(num_leaps=len(steps), nested_scale=1.0)
    discounted = train_once(alpha_0, net, x, sigmas, LeapDraws(steps))
    stopped = train_once(alpha_1, net, x, sigmas, LeapDraws(steps), lambda z, s: net(z.detach(), s))
    assert torch.equal(discounted, stopped) and discounted.abs().max() > 0
    assert not torch.allclose(discounted, train_once(alpha_1, net, x, sigmas, LeapDraws(steps)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, T])
def test_leaps_over_the_last_n_steps_are_draft_n(n):
    net, x, sigmas = Net(), noise(), grid(T)
    leaps = LeapAlign(num_leaps=n, nested_scale=1.0, weighting="none")
    ours = train_once(leaps, net, x, sigmas, LeapDraws(tuple(range(n, 0, -1))))
    draft = train_once(DRaFT(num_last_steps=n), net, x, sigmas, DRaFTDraws())
    torch.testing.assert_close(ours, draft, rtol=1e-12, atol=1e-14)
    assert draft.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [(5,), (8, 1), (7, 4, 2)])
def test_the_reward_sees_the_rollouts_image_bit_for_bit(dtype, steps):
    net, x, sigmas = Net(dtype), noise(64, dtype), grid(T, dtype)
    surrogate = LeapAlign(num_leaps=len(steps))(net, x, sigmas, LeapDraws(steps))
    expected = rollout(net, x, sigmas)
    assert torch.equal(surrogate.x_hat, expected) and torch.equal(surrogate.x_0, expected)
    assert surrogate.has_gradient and not surrogate.x_0.requires_grad


def test_the_reward_can_see_the_last_leaps_prediction():
    net, x, sigmas = Net(), noise(), grid(T)
    surrogate = LeapAlign(reward_input="x_hat")(net, x, sigmas, LeapDraws((K, J)))
    x_j = rollout(net, x, sigmas, stop=J)
    torch.testing.assert_close(surrogate.x_hat, leap(x_j, net(x_j, sigmas[J]), sigmas[J], sigmas[0]))
    torch.testing.assert_close(surrogate.x_0, rollout(net, x, sigmas))
    assert not torch.allclose(surrogate.x_hat, surrogate.x_0)


def true_distances(net, x, sigmas, steps):
    """Distances of the leaps from independently rolled-out states."""
    state = {t: rollout(net, x, sigmas, stop=t) for t in (*steps, 0)}
    return [
        (state[end] - (state[t] - (sigmas[t] - sigmas[end]) * net(state[t], sigmas[t]))).abs().mean(-1)
        for t, end in zip(steps, (*steps[1:], 0))
    ]


def test_distances_are_taken_before_the_connector():
    net, x, sigmas = Net(), noise(), grid(T)
    surrogate = LeapAlign(distance_floor=1e-6)(net, x, sigmas, LeapDraws((K, J)))
    d_j, d_0 = true_distances(net, x, sigmas, (K, J))
    assert d_j.min() > 0 and d_0.min() > 0
    torch.testing.assert_close(surrogate.metrics["d_j"], d_j.detach())
    torch.testing.assert_close(surrogate.metrics["d_0"], d_0.detach())
    torch.testing.assert_close(surrogate.weight, (1 / (d_j + d_0)).detach())
    assert not surrogate.weight.requires_grad
    assert (surrogate.metrics["k"], surrogate.metrics["j"]) == (K, J)


def test_metrics_of_three_leaps_name_every_landing():
    net, x, sigmas = Net(), noise(), grid(T)
    metrics = LeapAlign(num_leaps=3)(net, x, sigmas, LeapDraws((7, 4, 2))).metrics
    assert {name: int(metrics[name]) for name in ("k", "j1", "j2")} == {"k": 7, "j1": 4, "j2": 2}
    for name, distance in zip(("d_j1", "d_j2", "d_0"), true_distances(net, x, sigmas, (7, 4, 2)), strict=True):
        torch.testing.assert_close(metrics[name], distance.detach())


@pytest.mark.parametrize(
    "weighting, expected",
    [
        ("both", [1 / 5, 1 / 0.6]),
        ("d_j", [1 / 2, 1 / 0.1]),
        ("d_0", [1 / 3, 1 / 0.5]),
        ("none", [1.0, 1.0]),
    ],
)
def test_weights_of_known_distances(weighting, expected):
    d_j, d_0 = torch.tensor([2.0, 0.01]), torch.tensor([3.0, 0.5])  # the second d_j lies below tau
    torch.testing.assert_close(similarity_weight([d_j, d_0], 0.1, weighting), torch.tensor(expected))


@pytest.mark.parametrize("weighting, expected", [("both", 1 / 6.0), ("d_j", 1 / 3.0), ("d_0", 1 / 3.0)])
def test_weights_of_three_leaps_add_up_the_landings(weighting, expected):
    distances = [torch.tensor([d]) for d in (1.0, 2.0, 3.0)]
    assert similarity_weight(distances, 0.1, weighting).item() == pytest.approx(expected)


def test_nested_only_with_three_leaps_cuts_the_first_leaps_single_step_alone():
    """By hand: x_2 = sg(x_4) - .. v(alpha x_4), x_0 = x_2 - .. v(alpha x_2), where x_4 carries v(x_7)'s gradient."""
    net, x, sigmas, steps, alpha = Net(), noise(), grid(T), (7, 4, 2), 0.3
    s7, s4, s2 = (sigmas[t] for t in steps)
    x7, x4, x2 = (rollout(net, x, sigmas, stop=t) for t in steps)
    to_x4 = -(s7 - s4) * net(x7, s7)  # value aside, the gradient of x_hat at 4
    d4 = x4 + alpha * (to_x4 - to_x4.detach())
    to_x2 = -(s4 - s2) * net(d4, s4)  # no bare x_4 here
    d2 = x2 + alpha * (to_x2 - to_x2.detach())
    (to_x2 - s2 * net(d2, s2)).sum().backward()
    expected = net.grads()
    method = LeapAlign(num_leaps=3, nested_scale=alpha, nested_only=True)
    method(net, x, sigmas, LeapDraws(steps)).backward(torch.ones_like(x))
    torch.testing.assert_close(net.grads(), expected, rtol=1e-10, atol=1e-12)


def test_weight_multiplies_each_samples_gradient():
    net, x, sigmas = Net(), noise(), grid(T)
    weighted = LeapAlign()(net, x, sigmas, LeapDraws((K, J)))
    plain = LeapAlign(weighting="none")(net, x, sigmas, LeapDraws((K, J)))
    assert weighted.weight.unique().numel() > 1
    torch.testing.assert_close(objective(weighted).grad, weighted.weight[:, None] * objective(plain).grad)


# --- draws


def draws_of(method, num_steps: int, count: int) -> list[tuple[int, ...]]:
    generator = rng()
    return [method.draw(num_steps, generator, samples()).steps for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_steps_are_uniform_over_all_sets(n):
    drawn = draws_of(LeapAlign(num_leaps=n), 5, 4000)
    assert all(list(steps) == sorted(set(steps), reverse=True) and len(steps) == n for steps in drawn)
    counts = {steps: drawn.count(steps) for steps in set(drawn)}
    expected = {1: 5, 2: 10, 3: 10}[n]
    assert len(counts) == expected
    assert {t for steps in counts for t in steps} == set(range(1, 6))
    chi_squared = sum((c - 4000 / expected) ** 2 / (4000 / expected) for c in counts.values())
    assert chi_squared < 28  # 9 degrees of freedom: p < 0.001


@pytest.mark.parametrize(
    "timestep_range, num_steps, allowed",
    [
        ((0.0, 1.0), 5, {1, 2, 3, 4, 5}),
        ((0.0, 0.5), 8, {1, 2, 3, 4}),
        ((0.5, 1.0), 8, {5, 6, 7, 8}),
        ((0.0, 0.5), 5, {1, 2}),
        ((0.5, 1.0), 5, {3, 4, 5}),
        ((0.0, 0.29), 100, set(range(1, 30))),
    ],
)
def test_the_timestep_range_is_a_share_of_the_steps(timestep_range, num_steps, allowed):
    drawn = draws_of(LeapAlign(timestep_range=timestep_range), num_steps, 800)
    assert {t for steps in drawn for t in steps} == allowed


@pytest.mark.parametrize("n, distance, spacing", [(2, 0.5, 5), (2, 0.25, 2), (3, 0.3, 3), (2, 0.01, 1)])
def test_a_fixed_distance_is_kept_and_its_place_is_uniform(n, distance, spacing):
    drawn = draws_of(LeapAlign(num_leaps=n, leap_distance=distance), 10, 600)
    assert {a - b for steps in drawn for a, b in pairwise(steps)} == {spacing}
    assert {steps[-1] for steps in drawn} == set(range(1, 10 - (n - 1) * spacing + 1))


def test_a_fixed_distance_stays_in_the_timestep_range():
    method = LeapAlign(leap_distance=0.25, timestep_range=(0.25, 0.75))
    drawn = draws_of(method, 16, 400)
    assert {t for steps in drawn for t in steps} == set(range(5, 13)) and {k - j for k, j in drawn} == {4}


def test_the_same_generator_gives_the_same_draw():
    assert LeapAlign().draw(25, rng(7), samples()) == LeapAlign().draw(25, rng(7), samples())
    assert len({LeapAlign().draw(25, rng(seed), samples()) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    "method, num_steps",
    [
        (LeapAlign(), 1),
        (LeapAlign(num_leaps=5), 4),
        (LeapAlign(timestep_range=(0.0, 0.25)), 4),
        (LeapAlign(leap_distance=0.9, num_leaps=3), 10),
        (LeapAlign(leap_distance=0.5, timestep_range=(0.0, 0.5)), 10),
        (LeapAlign(timestep_range=(0.41, 0.45), num_leaps=1), 4),
    ],
)
def test_too_few_steps_are_refused_with_what_to_do(method, num_steps):
    with pytest.raises(UserError, match=r"leaps need .*raise the number of sampling steps"):
        method.draw(num_steps, rng(), samples())


@pytest.mark.parametrize("steps", [(3, 6), (3, 3), (6,), (6, 3, 1), (9, 3), (3, 0)])
def test_draws_that_do_not_fit_are_refused(steps):
    with pytest.raises(UserError, match="steps"):
        LeapAlign()(Net(), noise(), grid(T), LeapDraws(steps))


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"num_leaps": 1, "weighting": "d_j"}, "no d_j"),
        ({"num_leaps": 1, "nested_only": True}, "nested_only"),
        ({"num_leaps": 1, "leap_distance": 0.5}, "leap_distance"),
        ({"num_leaps": 0}, "num_leaps"),
        ({"nested_scale": -0.1}, "nested_scale"),
        ({"nested_scale": 1.1}, "nested_scale"),
        ({"distance_floor": 0.0}, "distance_floor"),
        ({"timestep_range": (0.5, 0.5)}, "timestep_range"),
        ({"timestep_range": (0.0, 1.5)}, "timestep_range"),
        ({"leap_distance": 1.0}, "leap_distance"),
        ({"weighting": "all"}, "weighting"),
        ({"reward_input": "x0"}, "reward_input"),
    ],
)
def test_impossible_settings_are_refused_at_construction(settings, word):
    with pytest.raises(UserError, match=word):
        LeapAlign(**settings)

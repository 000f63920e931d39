"""FlowBP's surrogates: identities, second derivations, draws and refusals. (Gradients: tests/golden/test_flowbp.py.)"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.methods import DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from leapalign.methods.drtune import DRTuneDraws
from leapalign.methods.flowbp_bridge import BridgeDraws
from leapalign.methods.flowbp_lagrange import LagrangeDraws, quadrature_weights, support_steps
from leapalign.methods.flowbp_sparse import SparseDraws, SparseSets
from leapalign.methods.leapalign import LeapDraws
from leapalign.methods.step_sets import weighted
from small_problem import Net, grid, noise, objective, rng, samples, train_once

T = 8
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
ALL = tuple(range(T, 0, -1))
GENERATOR = rng(1)


def test_sparse_with_every_step_active_is_drtune_without_early_stop():
    net, x, sigmas = Net(), noise(), grid(T)
    sparse = train_once(
        FlowBPSparse(num_training_steps=T, compensation=0.0, image_side_bias=0.0), net, x, sigmas, SparseDraws(ALL)
    )
    drtune = train_once(DRTune(num_training_steps=T), net, x, sigmas, DRTuneDraws(s=1, t_min=1))
    torch.testing.assert_close(sparse, drtune, rtol=1e-13, atol=1e-15)
    assert sparse.abs().max() > 1e-2


def test_compensation_changes_nothing_where_every_step_is_active():
    net, x, sigmas = Net(), noise(), grid(T)
    found = [
        train_once(FlowBPSparse(num_training_steps=T, compensation=gamma), net, x, sigmas, SparseDraws(ALL))
        for gamma in (0.0, 1.0)
    ]
    torch.testing.assert_close(*found, **CLOSE)


def test_bridge_without_nested_gradient_is_sparse():
    net, x, sigmas = Net(), noise(), grid(T)
    draws = BridgeDraws(j=3, above=(8, 5), below=(1,))
    bridge = train_once(FlowBPBridge(nested_scale=0.0), net, x, sigmas, draws)
    sparse = train_once(FlowBPSparse(), net, x, sigmas, SparseDraws((8, 5, 3, 1)))
    torch.testing.assert_close(bridge, sparse, **CLOSE)


def test_lagrange_with_one_support_is_leapalign():
    net, x, sigmas = Net(), noise(), grid(T)
    ours = FlowBPLagrange(num_supports=1, nested_scale=0.3, distance_floor=0.1)
    lagrange = train_once(ours, net, x, sigmas, LagrangeDraws(k=6, j=3))
    leaps = train_once(LeapAlign(nested_scale=0.3, distance_floor=0.1), net, x, sigmas, LeapDraws((6, 3)))
    torch.testing.assert_close(lagrange, leaps, **CLOSE)


def test_each_sample_may_have_its_own_active_steps():
    """A set a sample: the gradient is the sum of those of single samples with their own sets."""
    net, x, sigmas, method = Net(), noise(3), grid(T), FlowBPSparse(compensation=0.5)
    sets = torch.tensor([[8, 7, 5], [4, 6, 3], [1, 2, 2]])  # [K, B]
    whole = method(net, x, sigmas, SparseSets(sets))
    grads = torch.randn(x.shape, generator=rng(3), dtype=x.dtype)
    whole.backward(grads)
    found = net.grads()
    expected = torch.zeros_like(found)
    for b in range(3):
        single = method(net, x[b : b + 1], sigmas, SparseDraws(tuple(sets[:, b].tolist())))
        single.backward(grads[b : b + 1])
        expected += net.grads()
        torch.testing.assert_close(whole.x_hat[b : b + 1], single.x_hat, rtol=0, atol=1e-14)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(whole.x_hat, rollout(net, x, sigmas)) and expected.abs().max() > 1e-2


def test_a_rollout_serves_several_sets():
    net, x, sigmas, method = Net(), noise(), grid(T), FlowBPSparse()
    draws = [SparseDraws((7, 4, 1)), SparseDraws((8, 6, 2))]
    for surrogate, each in zip(method.surrogates(net, x, sigmas, draws), draws, strict=True):
        surrogate.backward(objective(surrogate).grad)
        found = net.grads()
        torch.testing.assert_close(found, train_once(method, net, x, sigmas, each), **CLOSE)


def test_the_quadrature_is_exact_for_polynomials():
    times, start, end = [0.9, 0.7, 0.35, 0.3], 0.9, 0.2
    weights = quadrature_weights(times, start, end)
    for power in range(4):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert sum(w * time**power for w, time in zip(weights, times)) == pytest.approx(exact, abs=1e-13)


def test_supports_are_evenly_spaced_and_hold_both_ends():
    assert support_steps(6, 2, 3) == [6, 4, 3] and support_steps(2, 0, 3) == [2, 1]
    for start in range(2, 26):
        for number in range(2, 9):
            steps = support_steps(start, 0, number)
            assert len(steps) == len(set(steps)) == min(number, start) and (steps[0], steps[-1]) == (start, 1)


# --- draws


def test_weights_of_the_draw_prefer_the_image_side():
    found = Counter(t for _ in range(4000) for t in weighted(3, 6, 1, 2.0, GENERATOR))
    for t in range(3, 7):
        assert found[t] / 4000 == pytest.approx((7 - t) ** 2 / 30, abs=0.025)


def test_sparse_draws_k_different_steps():
    draws = [FlowBPSparse().draw(25, GENERATOR, samples()).steps for _ in range(300)]
    assert all(len(set(steps)) == 3 and list(steps) == sorted(steps, reverse=True) for steps in draws)
    drawn = [t for steps in draws for t in steps]
    assert min(drawn) == 1 and max(drawn) > 15 and sum(drawn) / len(drawn) < 9


def test_draws_of_a_sample_do_not_depend_on_the_micro_batch():
    method = FlowBPSparse(step_draws="per-sample")
    draws = [method.draw(T, rng(5), samples(count=4))]
    draws += [method.draw(T, rng(5), samples(count=2, first=first, sharing=4)) for first in (0, 2)]
    whole, *parts = (torch.as_tensor(each.steps) for each in draws)
    assert whole.shape == (3, 4) and torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("num_steps, k", [(2, 2), (5, 5), (8, 5), (25, 5), (25, 3)])
def test_bridge_draws_the_lower_of_two_steps_and_always_k(num_steps, k):
    method = FlowBPBridge(num_training_steps=k)
    draws = [method.draw(num_steps, GENERATOR, samples()) for _ in range(2000)]
    for d in draws:
        assert len(d.above) >= 1 and 1 + len(d.above) + len(d.below) == k
        assert all(d.j < t <= num_steps for t in d.above) and all(1 <= t < d.j for t in d.below)
    pairs = num_steps * (num_steps - 1) / 2
    for j in range(1, num_steps):
        assert sum(d.j == j for d in draws) / 2000 == pytest.approx((num_steps - j) / pairs, abs=0.04)


def test_lagrange_draws_leaps_of_the_dirichlets_mean_length():
    draws = [FlowBPLagrange().draw(25, GENERATOR, samples()) for _ in range(1000)]
    assert all(2 <= d.j < d.k <= 25 for d in draws)
    assert sum(d.j - 1 for d in draws) / 1000 == pytest.approx(25 * 2.5 / 10.5, abs=0.5)
    assert sum(d.k - d.j for d in draws) / 1000 == pytest.approx(25 * 6 / 10.5, abs=0.5)
    short = [FlowBPLagrange(longest_image_side=0.4).draw(25, GENERATOR, samples()).j for _ in range(1000)]
    assert max(short) == 11
    assert FlowBPLagrange().draw(3, rng(), samples()) == (3, 2)


# --- refusals


@pytest.mark.parametrize(
    "method, fewest", [(FlowBPSparse(num_training_steps=4), 4), (FlowBPBridge(), 5), (FlowBPLagrange(), 3)]
)
def test_too_few_sampling_steps_are_refused(method, fewest):
    method.draw(fewest, rng(), samples())
    with pytest.raises(UserError, match=r"more sampling steps|use more steps"):
        method.draw(fewest - 1, rng(), samples())


@pytest.mark.parametrize(
    "method, draws",
    [
        (FlowBPSparse(), SparseDraws((T + 1, 2, 1))),
        (FlowBPBridge(), BridgeDraws(j=3, above=(3,), below=())),
        (FlowBPBridge(), BridgeDraws(j=3, above=(5,), below=(4,))),
        (FlowBPBridge(), BridgeDraws(j=0, above=(5,), below=())),
        (FlowBPLagrange(), LagrangeDraws(k=3, j=3)),
        (FlowBPLagrange(), LagrangeDraws(k=T + 1, j=3)),
    ],
)
def test_draws_for_another_grid_are_refused(method, draws):
    with pytest.raises(UserError):
        method(Net(), noise(), grid(T), draws)


@pytest.mark.parametrize(
    "method, settings",
    [
        (FlowBPSparse, {"num_training_steps": 0}),
        (FlowBPSparse, {"image_side_bias": -1.0}),
        (FlowBPSparse, {"compensation": 1.5}),
        (FlowBPSparse, {"step_draws": "all"}),
        (FlowBPBridge, {"num_training_steps": 1}),
        (FlowBPBridge, {"nested_scale": 2.0}),
        (FlowBPLagrange, {"num_supports": 0}),
        (FlowBPLagrange, {"num_supports": 9}),
        (FlowBPLagrange, {"second_scale": -0.1}),
        (FlowBPLagrange, {"distance_floor": 0.0}),
        (FlowBPLagrange, {"longest_image_side": float("nan")}),
    ],
)
def test_impossible_settings_are_refused_at_construction(method, settings):
    (field,) = settings
    with pytest.raises(UserError, match=field):
        method(**settings)

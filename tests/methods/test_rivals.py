"""LeapAlign's rivals: forwards, values, empty sets, draws. (Gradients: tests/golden.)"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.leap import leap
from leapalign.flow.rollout import rollout
from leapalign.methods import (
    AlignProp,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
)
from leapalign.methods.alignprop import AlignPropDraws
from leapalign.methods.draft import DRaFTDraws
from leapalign.methods.draft_lv import DRaFTLVDraws
from leapalign.methods.drtune import DRTuneDraws
from leapalign.methods.flowbp_bridge import BridgeDraws
from leapalign.methods.flowbp_lagrange import LagrangeDraws
from leapalign.methods.flowbp_sparse import SparseDraws
from leapalign.methods.leapalign import LeapDraws
from leapalign.methods.refl import ReFLDraws
from small_problem import Net, grid, noise, objective, rng, samples, train_once

T = 8
EPS = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

# method, draws, the steps with graph, all forwards (steps counted from the image)
FORWARDS = [
    (LeapAlign(), LeapDraws((6, 3)), [6, 3], T),
    (LeapAlign(num_leaps=1), LeapDraws((8,)), [8], T),
    (LeapAlign(num_leaps=3), LeapDraws((8, 4, 1)), [8, 4, 1], T),
    (ReFL(), ReFLDraws(3), [3], T - 3 + 1),
    (ReFL(), ReFLDraws(1), [1], T),
    (DRaFT(), DRaFTDraws(), [1], T),
    (DRaFT(num_last_steps=3), DRaFTDraws(), [3, 2, 1], T),
    (DRaFTLV(), DRaFTLVDraws(EPS), [1, 1, 1], T + 2),
    (DRTune(), DRTuneDraws(s=2, t_min=2), [6, 2], T - 2 + 1),
    (DRTune(), DRTuneDraws(s=1, t_min=3), [5], T - 3 + 1),
    (DRTune(num_training_steps=1), DRTuneDraws(s=1, t_min=3), [], T - 3 + 1),
    (AlignProp(), AlignPropDraws(2), [2, 1], T),
    (AlignProp(), AlignPropDraws(0), [], T),
    (FlowBPSparse(), SparseDraws((7, 4, 1)), [7, 4, 1], T),
    (FlowBPBridge(), BridgeDraws(j=3, above=(8, 5), below=(2, 1)), [8, 5, 3, 2, 1], T),
    (FlowBPBridge(num_training_steps=2), BridgeDraws(j=1, above=(8,), below=()), [8, 1], T),
    (FlowBPLagrange(), LagrangeDraws(k=7, j=3), [7, 5, 3, 2], T),  # 6 - 1.5 is rounded half to even
    (FlowBPLagrange(), LagrangeDraws(k=4, j=3), [4, 3, 2], T),
    (FlowBPLagrange(num_supports=1), LagrangeDraws(k=8, j=2), [8, 2], T),
]
each_method = pytest.mark.parametrize("method, draws, with_graph, forwards", FORWARDS)


@each_method
def test_the_differentiated_forwards_happen_inside_the_rollout(method, draws, with_graph, forwards):
    net, sigmas, seen = Net(), grid(T), []

    def velocity(x, sigma):
        seen.append(int((sigmas == sigma).nonzero()))
        return net(x, sigma)

    surrogate = method(velocity, noise(), sigmas, draws)
    assert len(seen) == forwards
    assert [t for t, graph in zip(seen, net.forwards, strict=True) if graph] == with_graph
    assert seen[:T] == list(range(T, T - len(seen[:T]), -1))
    assert surrogate.has_gradient == bool(with_graph)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_the_rollout_bit_for_bit(method, draws, with_graph, forwards, dtype):
    net, x, sigmas = Net(dtype), noise(dtype=dtype), grid(T, dtype)
    surrogate = method(net, x, sigmas, draws)
    if isinstance(method, ReFL | DRTune):  # they stop at t_min and leap
        x_t = rollout(net, x, sigmas, stop=draws.t_min)
        expected = leap(x_t, net(x_t, sigmas[draws.t_min]), sigmas[draws.t_min], sigmas[0])
        assert surrogate.x_0 is None
    else:
        expected = rollout(net, x, sigmas)
        assert torch.equal(surrogate.x_0, expected) and not surrogate.x_0.requires_grad
    assert torch.equal(surrogate.x_hat[: len(x)], expected)
    assert surrogate.x_hat.dtype == dtype
    assert surrogate.weight.shape == (len(surrogate.x_hat),) and surrogate.copies * len(x) == len(surrogate.x_hat)
    assert not any(value.requires_grad for value in surrogate.metrics.values())


@pytest.mark.parametrize("draws", [AlignPropDraws(0), DRTuneDraws(s=1, t_min=3)])
def test_an_empty_set_is_detected_and_backward_does_nothing(draws):
    net, method = Net(), AlignProp() if isinstance(draws, AlignPropDraws) else DRTune(num_training_steps=1)
    surrogate = method(net, noise(), grid(T), draws)
    result = objective(surrogate)
    assert not surrogate.has_gradient and result.has_gradient
    surrogate.backward(result.grad)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("depth", [1, 3, T])
def test_alignprop_at_a_depth_is_draft_of_that_depth(depth):
    net, x, sigmas = Net(), noise(), grid(T)
    ours = train_once(AlignProp(), net, x, sigmas, AlignPropDraws(depth))
    draft = train_once(DRaFT(num_last_steps=depth), net, x, sigmas, DRaFTDraws())
    assert torch.equal(ours, draft) and ours.abs().max() > 0


def test_draft_over_all_steps_is_the_gradient_of_the_whole_chain():
    net, x, sigmas = Net(), noise(), grid(T)
    state = x
    for t in range(T, 0, -1):
        state = state + (sigmas[t - 1] - sigmas[t]) * net(state, sigmas[t])
    state.sum().backward()
    expected = net.grads()
    DRaFT(num_last_steps=T)(net, x, sigmas, DRaFTDraws()).backward(torch.ones_like(x))
    torch.testing.assert_close(net.grads(), expected, rtol=1e-12, atol=1e-14)


def test_draft_lv_sums_one_step_gradients_of_renoised_copies():
    net, x, sigmas = Net(), noise(), grid(T)
    x_1 = rollout(net, x, sigmas, stop=1)
    x_0 = rollout(net, x, sigmas)
    starts = [x_1, *((1 - sigmas[1]) * x_0 + sigmas[1] * e for e in EPS)]
    phase = torch.arange(8, dtype=torch.float64)[:, None]  # small_problem's reward, by hand
    loss = sum((10 - torch.sin(z - sigmas[1] * net(z, sigmas[1]) + phase).sum(-1)).sum() / 8 for z in starts)
    loss.backward()
    expected = net.grads()
    surrogate = DRaFTLV()(net, x, sigmas, DRaFTLVDraws(EPS))
    result = objective(surrogate)
    surrogate.backward(result.grad)
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(net.grads(), expected, rtol=1e-12, atol=1e-14)


def test_drtune_has_no_nested_jacobian():
    """By hand: x_hat_0 = const - (s_6 - s_5) v(x_6) - s_2 v(x_2), every input a constant."""
    net, x, sigmas = Net(), noise(), grid(T)
    x6, x2 = (rollout(net, x, sigmas, stop=t) for t in (6, 2))
    (-(sigmas[6] - sigmas[5]) * net(x6, sigmas[6]) - sigmas[2] * net(x2, sigmas[2])).sum().backward()
    expected = net.grads()
    DRTune()(net, x, sigmas, DRTuneDraws(s=2, t_min=2)).backward(torch.ones_like(x))
    torch.testing.assert_close(net.grads(), expected, rtol=1e-12, atol=1e-14)


# --- draws


def drawn(method, num_steps: int, count: int = 600) -> list:
    generator = rng()
    return [method.draw(num_steps, generator, samples()) for _ in range(count)]


@pytest.mark.parametrize("num_steps, m", [(25, 11), (50, 22), (10, 4), (16, 7), (8, 4), (1, 1)])
@pytest.mark.parametrize("method", [ReFL(), DRTune(num_training_steps=1)])
def test_the_early_stop_is_uniform_over_the_papers_range(method, num_steps, m):
    assert m == max(1, round(11 * num_steps / 25))
    values = [draws.t_min for draws in drawn(method, num_steps)]
    assert set(values) == set(range(1, m + 1))
    assert max(values.count(t) for t in set(values)) < 2 * 600 / m + 1


def test_the_early_stop_range_is_a_setting():
    assert {d.t_min for d in drawn(ReFL(early_stop=0.2), 10)} == {1, 2}
    assert {d.t_min for d in drawn(DRTune(early_stop=1.0), 4)} == {1, 2, 3, 4}


@pytest.mark.parametrize("num_steps, k, highest", [(25, 2, 13), (10, 2, 5), (10, 3, 4), (7, 7, 1), (6, 1, 6)])
def test_drtune_draws_its_lowest_step_from_its_whole_range(num_steps, k, highest):
    method = DRTune(num_training_steps=k)
    values = {draws.s for draws in drawn(method, num_steps)}
    assert values == set(range(1, highest + 1))
    steps = [method.training_steps(s, num_steps) for s in values]
    assert all(len(set(s)) == k and min(s) >= 1 and max(s) <= num_steps for s in steps)
    assert all(b - a == num_steps // k for s in steps for a, b in pairwise(s))


def test_alignprop_draws_every_depth_from_none_to_all():
    values = [draws.depth for draws in drawn(AlignProp(), 5)]
    assert set(values) == {0, 1, 2, 3, 4, 5} and max(values.count(d) for d in range(6)) < 150


def test_draft_lv_takes_its_noise_from_the_callers_seeds():
    asked = []
    eps = DRaFTLV(num_copies=3).draw(T, rng(), samples(lambda n: asked.append(n) or torch.ones(n, 2, 4))).eps
    assert asked == [3] and torch.equal(eps, torch.ones(3, 2, 4))


# --- refusals


@pytest.mark.parametrize("method, num_steps", [(DRaFT(num_last_steps=5), 4), (DRTune(num_training_steps=5), 4)])
def test_more_training_steps_than_sampling_steps_are_refused(method, num_steps):
    method.draw(5, rng(), samples())
    with pytest.raises(UserError, match=r"has 4 steps.* more sampling steps"):
        method.draw(num_steps, rng(), samples())


@pytest.mark.parametrize(
    "method, draws",
    [
        (ReFL(), ReFLDraws(T + 1)),
        (ReFL(), ReFLDraws(0)),
        (DRaFT(num_last_steps=T + 1), DRaFTDraws()),
        (DRaFTLV(), DRaFTLVDraws(EPS[:1])),
        (DRaFTLV(), DRaFTLVDraws(EPS[:, :4])),
        (DRTune(), DRTuneDraws(s=5, t_min=1)),
        (DRTune(), DRTuneDraws(s=1, t_min=0)),
        (AlignProp(), AlignPropDraws(T + 1)),
    ],
)
def test_draws_for_another_grid_are_refused(method, draws):
    with pytest.raises(UserError):
        method(Net(), noise(), grid(T), draws)


@pytest.mark.parametrize(
    "method, settings",
    [
        (ReFL, {"early_stop": 0.0}),
        (ReFL, {"early_stop": 1.1}),
        (DRaFT, {"num_last_steps": 0}),
        (DRaFTLV, {"num_copies": 0}),
        (DRTune, {"num_training_steps": 0}),
        (DRTune, {"early_stop": -1.0}),
    ],
)
def test_impossible_settings_are_refused_at_construction(method, settings):
    (field,) = settings
    with pytest.raises(UserError, match=field):
        method(**settings)

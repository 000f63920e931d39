"""Norms of the gradients at the leaps' velocities, against explicit vector-Jacobian products (float64)."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from leapalign.flow.anchor import Anchor
from leapalign.flow.graph import with_graph
from leapalign.flow.rollout import rollout
from leapalign.methods import LeapAlign
from leapalign.methods.leapalign import LeapDraws, LeapSets, step_names
from leapalign.methods.objective import Hinge, latent_gradient
from small_problem import Net, grid, noise, score

T, B = 8, 4
PAIRS = torch.tensor([[[8, 7, 5, 2], [3, 2, 4, 1]], [[6, 7, 8, 4], [5, 1, 4, 3]], [[2, 8, 3, 7], [1, 6, 2, 5]]])
TRIPLES = torch.tensor([[[8, 7, 5, 6], [5, 4, 3, 2], [2, 1, 1, 1]], [[6, 3, 8, 5], [4, 2, 7, 4], [3, 1, 6, 2]]])
SHARED = torch.tensor([[[6], [3]]])  # M, n, B = 1, 2, 1
CASES = {
    "pairs": (PAIRS, {}),
    "one leap": (PAIRS[:, :1], {"num_leaps": 1}),
    "three leaps": (TRIPLES, {"num_leaps": 3, "nested_scale": 0.7}),
    "nested only": (PAIRS, {"nested_only": True, "nested_scale": 0.5}),
    "three leaps, nested only": (TRIPLES, {"num_leaps": 3, "nested_only": True}),
    "shared": (SHARED, {"weighting": "none"}),
    "the last leap's prediction": (SHARED, {"reward_input": "x_hat"}),
}


def by_hand(method: LeapAlign, net: Net, x, sigmas, steps, weights, g) -> dict[str, torch.Tensor]:
    """[M, B] by name. `g`: d l / d x_hat [B, ...] of each sample's own hinge, without weight."""
    names, found = step_names(method.num_leaps), {}
    for m, b in ((m, b) for m in range(len(steps)) for b in range(len(x))):
        indices = steps[m, :, min(b, steps.shape[2] - 1)].tolist()
        arriving = single = weights[m, b] * g[b : b + 1]
        for i in reversed(range(len(indices))):
            t, end = indices[i], [*indices, 0][i + 1]
            length = sigmas[t] - sigmas[end]
            last, cut = i == len(indices) - 1, method.nested_only and i == 0 and len(indices) > 1
            parts = {f"grad_single/{names[i]}": 0 * single if cut else single}
            parts |= {} if last else {f"grad_nested/{names[i]}": arriving if cut else arriving - single}
            for name, part in parts.items():
                found.setdefault(name, torch.zeros(len(steps), len(x)).double())[m, b] = length * part.norm()
            if i:
                x_t = rollout(net, x[b : b + 1], sigmas, stop=t).detach().requires_grad_()
                (through,) = torch.autograd.grad(net(x_t, sigmas[t]), x_t, -length * arriving)
                kept = 0 if method.nested_only and i == 1 else arriving
                arriving = kept + method.nested_scale * through
    return found


def own_gradient(surrogate) -> torch.Tensor:
    """d l / d x_hat [B, ...] of each sample's hinge, without its weight."""
    latents = surrogate.x_hat.detach().requires_grad_()
    hinge = (1.5 - score(latents, list(range(len(latents))))["r"]).relu()
    return torch.autograd.grad(hinge.sum(), latents)[0]


@contextmanager
def other_weights(net: Net):
    """By reference, as `training.reference` does it: the graph of the rollout keeps its own values."""
    own = [p.data for p in net.parameters()]
    for p in net.parameters():
        p.data = 0.9 * p.data
    yield
    for p, values in zip(net.parameters(), own):
        p.data = values


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("graph", ["plain", "all", "blocks", "inputs", "anchored"])
def test_the_norms_are_those_of_explicit_products(case, graph):
    steps, settings = CASES[case]
    net, x, sigmas = Net(), noise(B), grid(T)
    method = LeapAlign(pairs_per_rollout=len(steps), **settings)
    anchor = Anchor(weight=5.0, reference=lambda: other_weights(net), batch_size=B) if graph == "anchored" else None
    velocity = net if graph == "plain" else with_graph(net, graph if graph == "inputs" else "all", anchor=anchor)
    net.block_checkpoint = graph == "blocks"
    surrogate = method(velocity, x, sigmas, LeapSets(steps))
    measured = surrogate.by_steps
    assert all(not norms.any() and norms.shape == (len(steps), B) for norms in measured.gradients().values())
    surrogate.backward(latent_gradient(surrogate, score, {"r": Hinge(threshold=1.5)}).grad)
    expected = by_hand(method, net, x, sigmas, steps, measured.values["weight"], own_gradient(surrogate))
    found = {name: B * norms for name, norms in measured.gradients().items()}
    assert found.keys() == expected.keys()
    for name, norms in expected.items():
        torch.testing.assert_close(found[name], norms, rtol=1e-10, atol=1e-13)
    cut = {"grad_single/k"} if method.nested_only else set()
    assert {name for name, norms in expected.items() if norms.max() < 1e-3} == cut
    for i, name in enumerate(step_names(method.num_leaps)):
        assert torch.equal(measured.steps[name], steps[:, i].expand(-1, B))


@pytest.mark.parametrize("graph", ["all", "inputs"])
def test_the_graph_inside_the_rollout_has_the_same_norms(graph):
    net, x, sigmas = Net(), noise(B), grid(T)
    surrogates = [LeapAlign()(with_graph(net, graph), x, sigmas, d) for d in (LeapDraws((6, 3)), LeapSets(SHARED))]
    for surrogate in surrogates:
        surrogate.backward(latent_gradient(surrogate, score, {"r": Hinge(threshold=1.5)}).grad)
    one, other = (surrogate.by_steps for surrogate in surrogates)
    for ours, theirs in ((one.gradients(), other.gradients()), (one.values, other.values), (one.steps, other.steps)):
        assert {name: t.tolist() for name, t in ours.items()} == {name: t.tolist() for name, t in theirs.items()}


def test_a_rollout_that_is_used_again_measures_each_update_apart():
    net, x, sigmas, method = Net(), noise(B), grid(T), LeapAlign(pairs_per_rollout=3, step_draws="per-sample")
    first, second = method.surrogates(net, x, sigmas, [LeapSets(PAIRS), LeapSets(PAIRS.flip(0))])
    first.backward(latent_gradient(first, score, {"r": Hinge(threshold=1.5)}).grad)
    assert not any(norms.any() for norms in second.by_steps.gradients().values())
    second.backward(latent_gradient(second, score, {"r": Hinge(threshold=1.5)}).grad)
    for name, norms in first.by_steps.gradients().items():
        torch.testing.assert_close(second.by_steps.gradients()[name], norms.flip(0), rtol=1e-12, atol=1e-14)

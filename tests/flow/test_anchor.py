"""The velocity anchor, against its formula: every method, every setting of the graph, nested states included."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from leapalign.flow.anchor import Anchor
from leapalign.flow.graph import with_graph
from leapalign.methods import (
    RSM,
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
from leapalign.methods.flowbp_sparse import SparseDraws, SparseSets
from leapalign.methods.leapalign import LeapDraws, LeapSets
from leapalign.methods.refl import ReFLDraws
from leapalign.methods.rsm import RSMDraws
from small_problem import Net, grid, noise, objective, train_once

BETA, B = 0.7, 8
EPS = torch.randn(2, B, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SETS = LeapSets(torch.tensor([[[8], [3]], [[6], [5]], [[6], [3]]]))
CASES = [
    (LeapAlign(nested_scale=1.0), LeapDraws((6, 3)), 1),
    (LeapAlign(num_leaps=1), LeapDraws((5,)), 1),
    (LeapAlign(nested_scale=1.0, pairs_per_rollout=3), SETS, 3),
    (ReFL(), ReFLDraws(3), 1),
    (DRaFT(num_last_steps=3), DRaFTDraws(), 1),
    (DRaFTLV(), DRaFTLVDraws(EPS), 1),
    (DRTune(), DRTuneDraws(s=2, t_min=2), 1),
    (AlignProp(), AlignPropDraws(5), 1),
    (FlowBPSparse(), SparseDraws((7, 4, 1)), 1),
    (FlowBPSparse(), SparseSets(torch.tensor([[8, 6, 3, 2] * 2, [5, 4, 2, 1] * 2])), 1),
    (FlowBPBridge(nested_scale=1.0), BridgeDraws(j=3, above=(8, 5), below=(2, 1)), 1),
    (FlowBPLagrange(nested_scale=1.0), LagrangeDraws(k=7, j=3), 1),
    (RSM(), RSMDraws(torch.tensor([[8, 6, 3, 2] * 2, [5, 4, 2, 1] * 2])), 2),  # a mean over its steps
]
IDS = ["two leaps", "one leap", "three pairs", "refl", "draft-3", "draft-lv", "drtune", "alignprop"]
IDS += ["sparse", "sparse, a set a sample", "bridge", "lagrange", "rsm"]


@contextmanager
def base_weights(net: Net, base: Net):
    own = {name: p.data for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.data = base.get_parameter(name).data
    try:
        yield
    finally:
        for name, p in net.named_parameters():
            p.data = own[name]


def anchored(net: Net, base: Net, graph: str, beta: float = BETA, nested: bool = True):
    anchor = Anchor(weight=beta, reference=lambda: base_weights(net, base), batch_size=B, nested=nested)
    return with_graph(net, graph, anchor=anchor)


def differentiated_states(method, net, x, sigmas, draws):
    """Every (x_t, sigma, nested) at which the method differentiates, seen from outside."""
    states: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    class Seen:
        def __call__(self, x, sigma):
            if torch.is_grad_enabled():
                states.append((x.detach(), sigma, x.requires_grad))
            return net(x, sigma)

        def recomputed(self, x, sigma, v, share):
            states.append((x.detach(), sigma, x.requires_grad))
            return with_graph(net, "all").recomputed(x, sigma, v, share)

    method(Seen(), x, sigmas, draws)
    return states


@pytest.mark.parametrize("graph", ["all", "inputs"])
@pytest.mark.parametrize("nested", [True, False], ids=["all", "first"])
@pytest.mark.parametrize("method, draws, pairs", CASES, ids=IDS)
def test_the_gradient_is_that_of_the_formula(method, draws, pairs, nested, graph):
    net, base, x, sigmas = Net(), Net(seed=4), noise(B), grid(8)
    states = differentiated_states(method, net, x, sigmas, draws)
    plain = train_once(method, net, x, sigmas, draws)
    for x_t, sigma, inner in states:
        if nested or not inner:  # the state is a constant
            distance = (net(x_t, sigma) - base(x_t, sigma).detach()).square().mean(-1)
            (BETA * distance.mean() / pairs).backward()
    pull = net.grads()
    velocity = anchored(net, base, graph, nested=nested)
    found = train_once(method, net, x, sigmas, draws, velocity)
    torch.testing.assert_close(found, plain + pull, rtol=1e-10, atol=1e-13)
    assert pull.abs().max() > 1e-3 and velocity.drift().shape == (B,)


def test_the_states_of_leapalign_are_as_named():
    net, x, sigmas = Net(), noise(B), grid(8)
    nested = [inner for *_, inner in differentiated_states(LeapAlign(), net, x, sigmas, LeapDraws((6, 3)))]
    assert nested == [False, True]


@pytest.mark.parametrize("method, draws, pairs", CASES, ids=IDS)
def test_at_the_base_it_adds_nothing(method, draws, pairs):
    net, x, sigmas = Net(), noise(B), grid(8)
    plain = train_once(method, net, x, sigmas, draws)
    velocity = anchored(net, Net(), "all", beta=100.0)
    torch.testing.assert_close(train_once(method, net, x, sigmas, draws, velocity), plain, rtol=1e-12, atol=1e-14)
    assert velocity.drift().max() == 0


def test_it_pulls_without_any_reward():
    """Samples above the threshold have no reward gradient, but they are still held to the base."""
    net, base, x, sigmas = Net(), Net(seed=4), noise(B), grid(8)
    velocity = anchored(net, base, "all")
    surrogate = LeapAlign()(velocity, x, sigmas, LeapDraws((6, 3)))
    surrogate.backward(objective(surrogate, threshold=-10.0).grad)
    assert net.grads().abs().max() > 1e-3


def test_micro_batches_add_up():
    net, base, x, sigmas = Net(), Net(seed=4), noise(B), grid(8)
    method = LeapAlign(nested_scale=1.0)
    whole = train_once(method, net, x, sigmas, LeapDraws((6, 3)), anchored(net, base, "all"))
    velocity = anchored(net, base, "all")
    for start in (0, 4):
        surrogate = method(velocity, x[start : start + 4], sigmas, LeapDraws((6, 3)))

        def score(latents, rows, start=start):
            phase = torch.tensor([start + row for row in rows], dtype=latents.dtype)[:, None]
            return {"r": torch.sin(latents + phase).sum(-1)}

        from leapalign.methods.objective import Hinge, latent_gradient

        surrogate.backward(latent_gradient(surrogate, score, {"r": Hinge(threshold=10.0)}, batch_size=B).grad)
    torch.testing.assert_close(net.grads(), whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("graph", ["all", "inputs"])
@pytest.mark.parametrize("method, draws, pairs", CASES, ids=IDS)
def test_the_mean_is_pulled_as_in_its_formula(method, draws, pairs, graph):
    net, base, x, sigmas = Net(), Net(seed=4), noise(B), grid(8)
    plain = train_once(method, net, x, sigmas, draws)
    for x_t, sigma, _ in differentiated_states(method, net, x, sigmas, draws):
        m = (net(x_t, sigma) - base(x_t, sigma).detach()).mean(0)
        (3.0 * m.square().mean() / pairs).backward()
    pull = net.grads()
    anchor = Anchor(weight=0.0, mean_weight=3.0, reference=lambda: base_weights(net, base), batch_size=B)
    found = train_once(method, net, x, sigmas, draws, with_graph(net, graph, anchor=anchor))
    torch.testing.assert_close(found, plain + pull, rtol=1e-10, atol=1e-13)
    assert pull.abs().max() > 1e-3

"""What every method promises. Collected from the folder: a new method without a fixture here fails."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch

import leapalign.methods
from leapalign.methods import (
    AWM,
    RSM,
    AlignProp,
    DanceGRPO,
    DiffusionNFT,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    FlowDPPO,
    FlowGRPO,
    LeapAlign,
    MixGRPO,
    ReFL,
)
from leapalign.methods.policy_gradient import PolicyGradient
from small_problem import Net, grid, noise, objective, rng, samples

# one entry a config class: settings and a number of steps under which most draws have a gradient
FIXTURES = {
    LeapAlign: LeapAlign(),
    ReFL: ReFL(),
    DRaFT: DRaFT(num_last_steps=2),
    DRaFTLV: DRaFTLV(),
    DRTune: DRTune(),
    AlignProp: AlignProp(),
    FlowBPSparse: FlowBPSparse(step_draws="per-sample"),
    FlowBPBridge: FlowBPBridge(),
    FlowBPLagrange: FlowBPLagrange(),
    RSM: RSM(trained_share=0.5),
}
POLICY_GRADIENTS = {
    FlowGRPO: FlowGRPO(),
    DanceGRPO: DanceGRPO(),
    MixGRPO: MixGRPO(window=2, tail_share=0.6),
    FlowDPPO: FlowDPPO(),
    DiffusionNFT: DiffusionNFT(),
    AWM: AWM(num_times=3),
}
EVERY = [*FIXTURES, *POLICY_GRADIENTS]
T = 6


def is_method(item: object) -> bool:
    kept = set(vars(item)) if isinstance(item, type) and dataclasses.is_dataclass(item) else set()
    return {"name", "draw"} <= kept and bool({"__call__", "roll_out"} & kept)


def found_methods() -> set[type]:
    names = [module.name for module in pkgutil.iter_modules(leapalign.methods.__path__)]
    modules = [importlib.import_module(f"leapalign.methods.{name}") for name in names]
    return {item for module in modules for item in vars(module).values() if is_method(item)}


def test_every_method_has_a_fixture():
    assert found_methods() == set(FIXTURES) | set(POLICY_GRADIENTS)


def test_every_method_has_its_own_name_and_is_exported():
    names = [cls.name for cls in EVERY]
    assert len(set(names)) == len(names) and all(n == n.lower() for n in names)
    assert {cls.__name__ for cls in EVERY} == set(leapalign.methods.__all__)


@pytest.mark.parametrize("cls", EVERY)
def test_settings_are_frozen_keyword_only_documented_and_have_defaults(cls):
    method = cls()
    assert cls.__dataclass_params__.frozen and cls.__doc__ and hash(method) == hash(cls())
    assert method == dataclasses.replace(method)
    hints = get_type_hints(cls)  # the command line reads them: they resolve without torch's names
    assert all(f.kw_only and f.name in hints for f in dataclasses.fields(cls))
    if dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, dataclasses.fields(cls)[0].name, 0)


def test_no_method_imports_torch():
    modules = [f"leapalign.methods.{m.name}" for m in pkgutil.iter_modules(leapalign.methods.__path__)]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def call(method, net, x, seed: int):
    eps = torch.randn(5, *x.shape, generator=rng(9), dtype=x.dtype)
    draws = method.draw(T, rng(seed), samples(lambda n: eps[:n], len(x)))
    return method(net, x, grid(T), draws), draws


@pytest.mark.parametrize("method", FIXTURES.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("seed", range(5))
def test_a_call_is_a_function_of_its_arguments(method, seed):
    net, x = Net(), noise()
    torch.manual_seed(0)
    first, draws = call(method, net, x, seed)
    torch.manual_seed(1)  # the global generator plays no part
    second, _ = call(method, net, x, seed)
    assert torch.equal(first.x_hat, second.x_hat) and torch.equal(first.weight, second.weight)
    assert first.has_gradient == second.has_gradient and isinstance(draws, tuple)


@pytest.mark.parametrize("method", FIXTURES.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("seed", range(5))
def test_the_surrogate_is_well_formed_and_trains(method, seed):
    net, x = Net(), noise()
    surrogate, _ = call(method, net, x, seed)
    rows = surrogate.copies * len(x)
    assert surrogate.x_hat.shape == (rows, *x.shape[1:]) and surrogate.weight.shape == (rows,)
    assert surrogate.x_hat.isfinite().all() and (surrogate.weight > 0).all()
    assert not surrogate.weight.requires_grad and not x.requires_grad
    assert all(value.shape in ((), (len(x),)) and not value.requires_grad for value in surrogate.metrics.values())
    result = objective(surrogate)
    surrogate.backward(result.grad)
    grads = net.grads()
    assert grads.isfinite().all() and bool(grads.abs().max() > 0) == surrogate.has_gradient


@pytest.mark.parametrize("method", FIXTURES.values(), ids=lambda m: m.name)
def test_most_draws_have_a_gradient(method):
    results = [call(method, Net(), noise(2), seed)[0].has_gradient for seed in range(20)]
    assert sum(results) >= 10


@pytest.mark.parametrize("method", FIXTURES.values(), ids=lambda m: m.name)
def test_samples_do_not_see_each_other(method):
    """A sample's surrogate is the same in any company: nothing is averaged over the batch."""
    net, x = Net(), noise(4)
    draws = method.draw(T, rng(2), samples(lambda n: torch.zeros(n, *x.shape, dtype=x.dtype), 4))
    alone = method.draw(
        T, rng(2), samples(lambda n: torch.zeros(n, *x[1:2].shape, dtype=x.dtype), 1, first=1, sharing=4)
    )
    whole, single = method(net, x, grid(T), draws), method(net, x[1:2], grid(T), alone)
    rows = [1 + copy * 4 for copy in range(whole.copies)]
    torch.testing.assert_close(whole.x_hat[rows], single.x_hat, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.weight[rows], single.weight, rtol=0, atol=1e-12)


# Policy gradients


def rolled_out(method, net, x, seed: int, **places):
    eps = torch.randn(2 * T, *x.shape, generator=rng(9), dtype=x.dtype)
    draws = method.draw(T, rng(seed), samples(lambda n: eps[:n], len(x), **places))
    with torch.no_grad():
        return method.roll_out(net, x, grid(T), draws)


def loss_of(method, net, kept, advantages):
    return method.loss(net, Net(seed=5).requires_grad_(False), kept, advantages)


@pytest.mark.parametrize("method", POLICY_GRADIENTS.values(), ids=lambda m: m.name)
def test_a_policy_gradient_matches_the_protocol(method):
    assert isinstance(method, PolicyGradient) and not isinstance(FIXTURES[LeapAlign], PolicyGradient)
    assert isinstance(method.same_noise, bool) and isinstance(method.needs_base, bool) and method.advantage_limit > 0


@pytest.mark.parametrize("method", POLICY_GRADIENTS.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_rollout_is_a_function_of_its_arguments_and_its_losses_train(method, seed):
    net, x = Net(), noise()
    first, second = rolled_out(method, net, x, seed), rolled_out(method, net, x, seed)
    assert torch.equal(first.x_0, second.x_0) and first.x_0.shape == x.shape and not first.x_0.requires_grad
    advantages = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    for kept in first.steps:
        term = loss_of(method, net, kept, advantages)
        assert term.loss.shape == (len(x),) and term.loss.isfinite().all()
        assert all(v.shape == (len(x),) and not v.requires_grad for v in term.metrics.values())
        if term.log_ratio is not None:
            assert float(term.log_ratio.abs().max()) < 1e-12  # no weight has changed
        term.loss.sum().backward()
        assert float(net.grads().abs().max()) > 0


@pytest.mark.parametrize("method", POLICY_GRADIENTS.values(), ids=lambda m: m.name)
def test_samples_of_a_rollout_do_not_see_each_other(method):
    net, x = Net(), noise(4)
    eps = torch.randn(2 * T, *x.shape, generator=rng(9), dtype=x.dtype)
    with torch.no_grad():
        whole, single = (
            method.roll_out(net, x[rows], grid(T), method.draw(T, rng(2), samples(lambda n, r=rows: eps[:n, r], **p)))
            for rows, p in (
                (slice(0, 4), {"count": 4}),
                (slice(1, 2), {"count": 1, "first": 1, "sharing": 4}),
            )
        )
    torch.testing.assert_close(whole.x_0[1:2], single.x_0, rtol=0, atol=1e-14)
    advantages = torch.linspace(-1, 1, 4, dtype=x.dtype)
    for of_whole, of_single in zip(whole.steps, single.steps, strict=True):
        loss = loss_of(method, net, of_whole, advantages).loss[1:2]
        alone = loss_of(method, net, of_single, advantages[1:2]).loss
        torch.testing.assert_close(loss, alone, rtol=0, atol=1e-12)

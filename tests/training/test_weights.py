"""EMA against its closed form, and the clipped norm."""

from __future__ import annotations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.planning.tensor_bytes import LiveBytes
from leapalign.training.weights import EMA, clip_gradients, gradient_norm, trained_parameters


def test_ema_is_the_weighted_sum_of_all_weights():
    """shadow_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i."""
    d, w = 0.9, torch.randn(6, 3, dtype=torch.float64)
    p = {"w": torch.nn.Parameter(w[0].clone())}
    ema = EMA(p, d)
    for value in w[1:]:
        p["w"].data.copy_(value)
        ema.update()
    closed = d**5 * w[0] + (1 - d) * sum(d ** (5 - i) * w[i] for i in range(1, 6))
    torch.testing.assert_close(ema.shadow["w"], closed, rtol=1e-14, atol=1e-15)


def test_the_shadow_is_float32_and_applying_it_is_undone_bit_for_bit():
    p = {"w": torch.nn.Parameter(torch.randn(100).bfloat16())}
    before = p["w"].detach().clone()
    ema = EMA(p, 0.999)
    assert ema.shadow["w"].dtype == torch.float32
    p["w"].data.add_(0.01)
    live = p["w"].detach().clone()
    for _ in range(20):
        ema.update()
    assert (ema.shadow["w"] - before.float()).abs().max() > 1e-5  # in bfloat16 nothing would have moved
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(p["w"], ema.shadow["w"].bfloat16())
        raise KeyError
    assert torch.equal(p["w"], live)


def test_applying_averages_holds_no_second_copy_of_the_weights():
    """Weights and averages change places: of ten equal tensors at most two are there twice at a time."""
    p = {str(i): torch.nn.Parameter(torch.randn(1000)) for i in range(10)}
    ema = EMA(p, 0.5)
    for w in p.values():
        w.data.mul_(2)
    ema.update()
    live, averages = ({n: t.detach().clone() for n, t in each.items()} for each in (p, ema.shadow))
    counted = LiveBytes()
    counted.begin("applied")
    with counted, ema.applied():
        assert all(torch.equal(p[n], averages[n]) for n in p)
    assert all(torch.equal(p[n], live[n]) and torch.equal(ema.shadow[n], averages[n]) for n in p)
    assert not any(torch.equal(live[n], averages[n]) for n in p)
    assert 4000 <= counted.peaks()["applied"] <= 8000


def test_only_what_requires_a_gradient_is_trained():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert list(trained_parameters(net)) == ["1.weight", "1.bias"]
    with pytest.raises(UserError, match="nothing to train"):
        trained_parameters(net.requires_grad_(False))


def test_norm_and_clipping():
    p = {n: torch.nn.Parameter(torch.zeros(2)) for n in "abc"}
    p["a"].grad, p["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = gradient_norm(p)
    assert float(norm) == 5
    clip_gradients(p, norm, 0.0)
    assert float(gradient_norm(p)) == 5
    clip_gradients(p, norm, 10.0)
    assert float(gradient_norm(p)) == 5
    clip_gradients(p, norm, 1.0)
    assert float(gradient_norm(p)) == pytest.approx(1, rel=1e-5)
    assert float(gradient_norm({"c": p["c"]})) == 0

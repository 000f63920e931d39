"""golden/gradients: loss and gradient of every method on tiny float64 networks, through the public classes."""

from __future__ import annotations

import pytest
import torch

from golden_cases import COPY, every_case
from leapalign.flow.leap import Coefficients, general_leap, leap, linear, predict_ends, trigonometric
from leapalign.flow.leap import variance_preserving as vp
from leapalign.methods import DRaFT, DRaFTLV, DRTune, LeapAlign, ReFL
from leapalign.methods.draft import DRaFTDraws
from leapalign.methods.draft_lv import DRaFTLVDraws
from leapalign.methods.drtune import DRTuneDraws
from leapalign.methods.leapalign import LeapDraws
from leapalign.methods.objective import Hinge, latent_gradient
from leapalign.methods.refl import ReFLDraws

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def method_and_draws(name: str, a: dict):
    """The public class and the explicit draws that a case of the file describes."""
    if name == "leapalign":
        method = LeapAlign(
            num_leaps=len(a["steps"]),
            nested_scale=a["alpha"],
            distance_floor=a["tau"],
            weighting=a["weighting"],
            reward_input={"x0": "x_0", "x_hat": "x_hat"}[a["reward_input"]],
            nested_only=a.get("nested_only", False),
        )
        return method, LeapDraws(tuple(a["steps"]))
    if name == "refl":
        return ReFL(), ReFLDraws(a["t_min"])
    if name == "draft_k":
        return DRaFT(num_last_steps=a["K"]), DRaFTDraws()
    if name == "draft_lv":
        return DRaFTLV(num_copies=len(a["eps"])), DRaFTLVDraws(f64(a["eps"]))
    assert name == "drtune"
    return DRTune(num_training_steps=a["K"]), DRTuneDraws(s=a["s"], t_min=a["t_min"])


def velocity_of(net: dict[str, torch.Tensor]):
    """v(x, t) = tanh(x W1' + b1 + t u) W2' + t c."""
    return lambda x, t: torch.tanh(x @ net["W1"].T + net["b1"] + t * net["u"]) @ net["W2"].T + t * net["c"]


@pytest.mark.parametrize("case", every_case("gradients/cases.json"))
def test_every_case(case):
    net = {name: f64(values).requires_grad_() for name, values in case["net"].items()}
    a, p = f64(case["reward"]["a"]), f64(case["reward"]["p"])
    x, sigmas, expected = f64(case["x1"]), f64(case["sigmas"]), case["expected"]
    method, draws = method_and_draws(case["method"], case["args"])

    surrogate = method(velocity_of(net), x, sigmas, draws)
    result = latent_gradient(
        surrogate, lambda z, rows: {"r": (a * torch.sin(z + p)).sum(-1)}, {"r": Hinge(threshold=case["args"]["lam"])}
    )
    surrogate.backward(result.grad)

    torch.testing.assert_close(result.loss, f64(expected["loss"]), **TOLERANCE)
    torch.testing.assert_close(result.rewards["r"][: len(x)], f64(expected["reward"]), **TOLERANCE)
    for name, values in expected["grads"].items():
        grad = net[name].grad if net[name].grad is not None else torch.zeros_like(net[name])
        torch.testing.assert_close(grad, f64(values), **TOLERANCE)


SCHEDULES = {"linear": linear, "trigonometric": trigonometric, "variance_preserving": vp}


@pytest.mark.parametrize("case", every_case("gradients/leaps.json"))
def test_every_leap(case):
    x, v, k, j = (f64(case[name]) for name in ("x", "v", "k", "j"))
    at_k, at_j = SCHEDULES[case["schedule"]](k), SCHEDULES[case["schedule"]](j)
    stored = Coefficients(*(f64(case[name]) for name in ("alpha_k", "beta_k", "d_alpha_k", "d_beta_k")))
    torch.testing.assert_close(torch.stack(at_k), torch.stack(stored), **TOLERANCE)

    x0_hat, x1_hat = predict_ends(x, v, at_k)
    torch.testing.assert_close(x0_hat, f64(case["x0_hat"]), **TOLERANCE)
    torch.testing.assert_close(x1_hat, f64(case["x1_hat"]), **TOLERANCE)
    torch.testing.assert_close(general_leap(x, v, at_k, at_j), f64(case["xj_hat"]), **TOLERANCE)
    if case["schedule"] == "linear":
        torch.testing.assert_close(leap(x, v, k, j), f64(case["xj_hat"]), **TOLERANCE)


def test_the_copy_is_complete():
    cases = every_case("gradients/cases.json")
    copied = [c.values[0] for c in cases if c.id.startswith("copy")]
    assert (COPY / "gradients" / "cases.json").is_file() and len(copied) == 168
    assert {c["method"] for c in copied} == {"leapalign", "refl", "draft_k", "draft_lv", "drtune"}

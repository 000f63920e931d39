"""golden/flowbp: loss, gradient, factors, weights and allocation tables of FlowBP's three surrogates, in float64."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from golden_cases import COPY
from golden_folder import GOLDEN
from leapalign.methods import FlowBPBridge, FlowBPLagrange, FlowBPSparse
from leapalign.methods.flowbp_bridge import BridgeDraws, allocation
from leapalign.methods.flowbp_lagrange import ACTIVE, LagrangeDraws, quadrature_weights, segment_starts, support_steps
from leapalign.methods.flowbp_sparse import SparseDraws
from leapalign.methods.objective import Hinge, latent_gradient

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
TABLES = {"cases": 6, "bridge_allocation": 60, "dirichlet_to_steps": 36}


def rows(table: str) -> list[Any]:
    """One parameter a row, of the golden folder and of the copy that ships with the repository."""
    parameters = []
    for name, folder in (("copy", COPY), ("golden", GOLDEN)):
        file = folder / "flowbp" / "cases.json"
        if file.is_file():
            found = json.loads(file.read_text())[table]
            parameters += [pytest.param(row, id=f"{name}-{row.get('name', i)}") for i, row in enumerate(found)]
        else:
            absent = pytest.mark.skip(reason=f"no {file}; set LEAPALIGN_GOLDEN to the golden data's folder")
            parameters.append(pytest.param(None, id=f"{name}-absent", marks=absent))
    return parameters


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def method_and_draws(name: str, a: dict[str, Any]) -> tuple[Any, Any]:
    """The public class and the explicit draws that a case describes."""
    if name == "flowbp-sparse":
        method = FlowBPSparse(num_training_steps=len(a["active"]), compensation=a["gamma"])
        return method, SparseDraws(tuple(a["active"]))
    if name == "flowbp-bridge":
        number = 1 + len(a["above"]) + len(a["below"])
        method = FlowBPBridge(num_training_steps=number, compensation=a["gamma"], nested_scale=a["alpha"])
        return method, BridgeDraws(j=a["j"], above=tuple(a["above"]), below=tuple(a["below"]))
    assert name == "flowbp-lagrange" and a["num_active"] == ACTIVE
    method = FlowBPLagrange(
        num_supports=a["order"],
        compensation=a["gamma"],
        second_scale=a["second_scale"],
        nested_scale=a["alpha"],
        distance_floor=a["tau"],
    )
    return method, LagrangeDraws(k=a["k"], j=a["j"])


@pytest.mark.parametrize("case", rows("cases"))
def test_every_case(case):
    (a, b, c), matrix, p = f64(case["velocity"]["theta"]), f64(case["velocity"]["M"]), f64(case["reward"]["p"])
    theta = [each.clone().requires_grad_() for each in (a, b, c)]
    sigmas, expected = f64(case["sigmas"]), case["expected"]
    method, draws = method_and_draws(case["method"], case["settings_and_draws"])

    def velocity(x, sigma):
        return theta[0] * torch.tanh(x @ matrix.T) + theta[1] * sigma * x + theta[2]

    surrogate = method(velocity, f64(case["x_T"]), sigmas, draws)
    terms = {"r": Hinge(threshold=case["reward"].get("threshold", case.get("threshold")))}
    result = latent_gradient(surrogate, lambda z, rows: {"r": torch.sin(z + p).sum(-1)}, terms)
    surrogate.backward(result.grad)

    torch.testing.assert_close(result.loss, f64(expected["loss"]), **TOLERANCE)
    torch.testing.assert_close(torch.stack([t.grad for t in theta]), f64(expected["grad"]), **TOLERANCE)
    torch.testing.assert_close(surrogate.x_hat.detach(), f64(expected["x_0"]), **TOLERANCE)
    torch.testing.assert_close(result.rewards["r"], f64(expected["rewards"]), **TOLERANCE)
    torch.testing.assert_close(surrogate.weight, f64(expected["weight"]), **TOLERANCE)
    for name in ("factor", "factor_kj", "factor_j0", "d_j", "d_0"):
        if name in expected:
            torch.testing.assert_close(surrogate.metrics[name], f64(expected[name]), **TOLERANCE)
    if isinstance(draws, LagrangeDraws):
        for leap, start, end in (("kj", draws.k, draws.j), ("j0", draws.j, 0)):
            steps = support_steps(start, end, method.num_supports)
            assert steps == expected[f"supports_{leap}"] == list(method.supports(sigmas, start, end))
            weights = quadrature_weights([float(sigmas[t]) for t in steps], float(sigmas[start]), float(sigmas[end]))
            assert weights == pytest.approx(expected[f"weights_{leap}"], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("row", rows("bridge_allocation"))
def test_every_allocation(row):
    assert allocation(row["T"], row["K"], row["j"]) == (row["above"], row["at_j_and_below"])


@pytest.mark.parametrize("row", rows("dirichlet_to_steps"))
def test_every_pair(row):
    longest = row["max_j"] - 1 if row["max_j"] else row["T"]
    assert segment_starts(row["proportions"], row["T"], longest) == (row["k"], row["j"])


def test_the_copy_is_complete():
    for table, number in TABLES.items():
        assert sum(row.id.startswith("copy") for row in rows(table)) == number

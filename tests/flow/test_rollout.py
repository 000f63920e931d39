"""The rollout against closed answers; its graph; what it refuses; the two ways to keep less of the graph."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.graph import inputs_only, own_backward
from leapalign.flow.grids import sigma_grid
from leapalign.flow.rollout import check_steps, euler_step, rollout


def test_a_constant_velocity_is_followed_exactly():
    noise, v = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    sigmas = sigma_grid(7, 3.0, dtype=torch.float64)
    torch.testing.assert_close(rollout(lambda x, s: v, noise, sigmas), noise - v)
    torch.testing.assert_close(rollout(lambda x, s: v, noise, sigmas, stop=3), noise - (1 - sigmas[3]) * v)


def test_it_converges_to_the_solution_of_the_equation():
    # dx/dsigma = 2 x gives x(0) = x(1) e^-2; Euler is of first order: a quarter of the step, a quarter of the error
    noise = torch.ones(1, 1, dtype=torch.float64)
    errors = [
        (rollout(lambda x, s: 2 * x, noise, sigma_grid(steps, dtype=torch.float64)) - torch.e**-2).abs().item()
        for steps in (100, 400)
    ]
    assert errors[1] < 1e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_the_velocity_sees_every_sigma_once_noisiest_first():
    seen = []

    def velocity(x, sigma):
        seen.append(sigma.item())
        return x

    sigmas = sigma_grid(5, 2.0)
    rollout(velocity, torch.randn(1, 2), sigmas)
    assert seen == sigmas[1:].flip(0).tolist()


def test_only_the_last_steps_keep_their_graph():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    noise, sigmas = torch.ones(1, 1, dtype=torch.float64), sigma_grid(4, dtype=torch.float64)
    for graph_steps in range(5):
        x_0 = rollout(lambda x, s: weight * x, noise, sigmas, graph_steps=graph_steps)
        assert x_0.requires_grad == (graph_steps > 0)
        torch.testing.assert_close(x_0.detach(), noise * (1 - 0.125) ** 4)  # x_0 = (1 - w / 4)^4
        if graph_steps:  # d/dw of the last K factors
            (grad,) = torch.autograd.grad(x_0, weight)
            torch.testing.assert_close(grad.item(), -graph_steps / 4 * 0.875**3)


def test_an_euler_step_is_the_printed_one():
    x, v, sigmas = torch.randn(2, 3), torch.randn(2, 3), sigma_grid(4, 3.0)
    assert torch.equal(euler_step(x, v, sigmas[3], sigmas[2]), x + (sigmas[2] - sigmas[3]) * v)


@pytest.mark.parametrize(
    "sigmas",
    [torch.linspace(1, 0, 5), torch.tensor([0.1, 1.0]), torch.tensor([0.0, 0.5, 0.5, 1.0]), torch.zeros(1)],
    ids=["descending", "no image", "an empty step", "no step"],
)
def test_wrong_grids_are_refused(sigmas):
    with pytest.raises(UserError, match="ascending grid"):
        rollout(lambda x, s: x, torch.randn(1, 2), sigmas)


def test_states_in_half_precision_are_refused():
    with pytest.raises(UserError, match="float32"):
        rollout(lambda x, s: x, torch.randn(1, 2).bfloat16(), sigma_grid(4))


@pytest.mark.parametrize("steps", [[0], [6], [5, 1, -1]])
def test_steps_outside_the_grid_are_refused(steps):
    check_steps([1, 5], 5)
    with pytest.raises(UserError, match=r"outside 1\.\.5"):
        check_steps(steps, 5)


def counted() -> tuple[Any, torch.Tensor, torch.Tensor, list[bool], tuple[torch.Tensor, torch.Tensor]]:
    """A velocity, its weight, the weight's gradient, whether each call had a graph, and where."""
    calls: list[bool] = []
    weight = torch.randn(3, 3, requires_grad=True)

    def velocity(x, sigma):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(x @ weight) * sigma

    x, sigma = torch.randn(2, 3), torch.tensor(0.5)
    (gradient,) = torch.autograd.grad(velocity(x, sigma).sum(), weight)
    calls.clear()
    return velocity, weight, gradient, calls, (x, sigma)


def test_inputs_only_runs_again_in_backward_and_nowhere_else():
    velocity, weight, plain, calls, (x, sigma) = counted()
    v = inputs_only(velocity)(x, sigma)
    assert calls == [False] and v.requires_grad
    v.sum().backward()
    assert calls == [False, True] and weight.grad is not None and torch.equal(plain, weight.grad)
    with torch.no_grad():
        assert not inputs_only(velocity)(x, sigma).requires_grad
    assert len(calls) == 3
    with pytest.raises(RuntimeError, match="not have been used in the graph"):  # said
        torch.autograd.grad(inputs_only(velocity)(x, sigma).sum(), weight)


@pytest.mark.parametrize("wrapper", [own_backward, inputs_only])
def test_each_forward_has_a_backward_of_its_own(wrapper):
    """So that a weight's gradient is in .grad before the next forward's backward begins."""
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(None if weight.grad is None else weight.grad.clone())
            return grad

    def forward(x, sigma):
        return Look.apply(torch.tanh(x @ weight) * sigma)

    class TwoForwards:
        wrap = staticmethod(lambda v: v)

        def __call__(self, x, sigma):
            forwards = self.wrap(forward)
            return forwards(x, sigma) - 3 * forwards(-2 * x, sigma)

        def by_forward(self, wrap):
            other = TwoForwards()
            other.wrap = wrap
            return other

    x, sigma = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    plain = torch.autograd.grad(TwoForwards()(x, sigma).sum(), (x, weight))
    assert seen == [None, None]  # autograd by itself adds to .grad at the end
    seen.clear()
    wrapper(TwoForwards())(x, sigma).sum().backward()
    assert seen[0] is None and seen[1].abs().sum() > 0 and len(seen) == 2
    for leaf, expected in zip((x, weight), plain):
        assert leaf.grad is not None and torch.allclose(leaf.grad, expected, atol=1e-14)


def test_own_backward_runs_once_and_says_so():
    velocity, weight, plain, calls, (x, sigma) = counted()
    v = own_backward(velocity)(x, sigma)
    v.sum().backward(retain_graph=True)
    assert calls == [True] and weight.grad is not None and torch.equal(plain, weight.grad)
    with pytest.raises(RuntimeError, match="run the forward again"):
        v.sum().backward()
    with torch.no_grad():
        assert not own_backward(velocity)(x, sigma).requires_grad
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(own_backward(velocity)(x, sigma).sum(), weight)


def test_inputs_only_saves_only_inputs():
    weight = torch.nn.Parameter(torch.randn(3, 300))

    def velocity(x, sigma):
        return torch.tanh(x @ weight) @ weight.T

    def saved_numbers(v) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            v(torch.randn(4, 3), torch.tensor(0.5))
        return sum(n for n in saved if n != weight.numel())  # the weights are there anyway

    assert saved_numbers(velocity) > 1000
    assert saved_numbers(inputs_only(velocity)) <= 4 * 3 + 1


def test_importing_methods_imports_no_torch():
    code = "import sys, leapalign.methods, leapalign.methods.objective; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

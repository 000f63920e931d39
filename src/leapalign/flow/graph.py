"""How much of a differentiated forward's graph is kept (arXiv 2604.15311, Sec. 4.2: memory, not gradient, is chosen).

Three settings, one gradient: "all" keeps everything, "blocks" the inputs of the model's blocks (the model's own
gradient checkpointing, which the caller switches on), "inputs" only the model's inputs. In training each differentiated
forward has a backward of its own under all three (`with_graph`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.flow.rollout import Velocity


def with_graph(velocity: Velocity, graph: str) -> Velocity:
    """The velocity as a run with this setting of `graph` trains it."""
    return inputs_only(velocity) if graph == "inputs" else own_backward(velocity)


def own_backward(velocity: Velocity) -> Velocity:
    """The same velocity and gradient; each forward has a backward of its own, which adds to the weights' .grad at once.

    In one backward of several forwards (leaps, branches of guidance) autograd would hold a sum of the weights'
    gradients beside .grad, as large as the weights, and whole on every rank where they are sharded. A velocity that is
    made of several forwards says so by `by_forward`, and they are taken one by one.

    Its weights must be leaves, and `backward` must be called, once: `torch.autograd.grad` for weights raises
    RuntimeError.
    """
    return _by_forward(velocity, own_backward) or _with_input_gradient(velocity, _OwnBackward.apply)


def inputs_only(velocity: Velocity) -> Velocity:
    """As `own_backward`, and only (x, sigma) are kept: the forward runs again during backward.

    So however many leaps share the weights, one forward's graph is alive at a time.

    The velocity must be deterministic (no dropout): the random state is not replayed. `torch.autograd.grad` raises
    RuntimeError.
    """
    return _by_forward(velocity, inputs_only) or _with_input_gradient(velocity, _checkpoint)


def _by_forward(velocity: Velocity, wrap: Callable[[Velocity], Velocity]) -> Velocity | None:
    by_forward = getattr(velocity, "by_forward", None)
    return by_forward(wrap) if by_forward is not None else None


def _with_input_gradient(velocity: Velocity, run: Callable[[Velocity, Tensor, Tensor], Any]) -> Velocity:
    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return velocity(x, sigma)
        # a backward of its own is only made for an input with gradient; here that gradient goes nowhere
        x = x if x.requires_grad else x.detach().requires_grad_()
        return cast("Tensor", run(velocity, x, sigma))

    return wrapped


def _checkpoint(velocity: Velocity, x: Tensor, sigma: Tensor) -> Any:
    def noticed(x: Tensor, sigma: Tensor) -> Tensor:
        _again.append(torch.is_grad_enabled())  # the first time it is not
        try:
            return velocity(x, sigma)
        finally:
            _again.pop()

    return checkpoint(noticed, x, sigma, use_reentrant=True, preserve_rng_state=False)


_again: list[bool] = []


def runs_again() -> bool:
    """Whether a forward of `inputs_only` is being run a second time, in its backward."""
    return any(_again)


class _OwnBackward(torch.autograd.Function):
    """A forward whose graph is kept apart, and gone through when the backward around it comes here."""

    @staticmethod
    def forward(ctx: Any, velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:  # pyright: ignore
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.v = velocity(ctx.x, sigma)
        return ctx.v.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:  # pyright: ignore
        if not hasattr(ctx, "v"):
            raise RuntimeError("own_backward: this graph has been gone through; run the forward again")
        x, v = ctx.x, ctx.v
        del ctx.x, ctx.v
        torch.autograd.backward(v, grad)
        return None, x.grad, None

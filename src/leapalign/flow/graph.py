"""Activation checkpointing of differentiated forwards (arXiv 2604.15311, Sec. 4.2).

Three settings with the same gradient: "all" keeps the whole graph, "blocks" the inputs of the model's blocks (the
model's own gradient checkpointing, which the caller switches on), "inputs" only the model's inputs. In training each
differentiated forward has its own backward under all three (`with_graph`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.flow.rollout import Velocity

Around: TypeAlias = "Callable[[], AbstractContextManager[None]]"


@runtime_checkable
class Composite(Protocol):
    """A velocity computed by several forwards of the policy, for instance two guidance branches."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def by_forward(self, wrap: Callable[[Velocity], Velocity]) -> Velocity:
        """Return the same velocity with `wrap` applied to each of its forwards."""
        ...


@runtime_checkable
class CheckpointsBlocks(Protocol):
    """A policy with gradient checkpointing: keeps only the inputs of its blocks and recomputes them in backward."""

    def enable_gradient_checkpointing(self) -> None: ...


def with_graph(velocity: Velocity, graph: str, recomputation: Around = nullcontext) -> Velocity:
    """Return the velocity for training with this setting of `graph`.

    `recomputation()` wraps every forward that "inputs" recomputes in the backward pass.
    """
    return inputs_only(velocity, recomputation) if graph == "inputs" else own_backward(velocity)


def own_backward(velocity: Velocity) -> Velocity:
    """Return the same velocity and gradient; each forward adds to the weights' .grad in its own backward.

    In one backward through several forwards (leaps, guidance branches), autograd would hold a sum of weight gradients
    besides .grad, as large as the weights and, for sharded weights, whole on every rank. The forwards of a `Composite`
    are wrapped one by one.

    Weights must be leaves, and `backward` must be called exactly once; `torch.autograd.grad` for weights raises
    RuntimeError.
    """
    if isinstance(velocity, Composite):
        return velocity.by_forward(own_backward)
    return _with_input_gradient(velocity, _OwnBackward.apply)


def inputs_only(velocity: Velocity, recomputation: Around = nullcontext) -> Velocity:
    """Like `own_backward`, but keep only (x, sigma) and recompute the forward in the backward pass.

    Only one forward's graph exists at a time, for any number of leaps. It is the graph of a whole forward, so if the
    model can checkpoint its blocks, "blocks" usually needs less memory.

    The velocity must be deterministic (no dropout), because RNG state is not restored. `torch.autograd.grad` raises
    RuntimeError. `recomputation()` wraps each recomputed forward.
    """
    if isinstance(velocity, Composite):
        return velocity.by_forward(partial(inputs_only, recomputation=recomputation))
    return _with_input_gradient(velocity, partial(_checkpoint, recomputation=recomputation))


def _with_input_gradient(velocity: Velocity, run: Callable[[Velocity, Tensor, Tensor], Any]) -> Velocity:
    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return velocity(x, sigma)
        # autograd calls a Function's backward only if an input requires a gradient; this gradient is unused
        x = x if x.requires_grad else x.detach().requires_grad_()
        return cast("Tensor", run(velocity, x, sigma))

    return wrapped


def _checkpoint(velocity: Velocity, x: Tensor, sigma: Tensor, *, recomputation: Around) -> Any:
    def forward(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # first forward; gradients are on in the backward pass
            return velocity(x, sigma)
        with recomputation():
            return velocity(x, sigma)

    return checkpoint(forward, x, sigma, use_reentrant=True, preserve_rng_state=False)


class _OwnBackward(torch.autograd.Function):
    """A forward with a separate graph, traversed when the outer backward reaches this node."""

    @staticmethod
    def forward(ctx: Any, velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:  # pyright: ignore
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.v = velocity(ctx.x, sigma)
        return ctx.v.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:  # pyright: ignore
        if not hasattr(ctx, "v"):
            raise RuntimeError("own_backward: this graph was already used by a backward; run the forward again")
        x, v = ctx.x, ctx.v
        del ctx.x, ctx.v
        torch.autograd.backward(v, grad)
        return None, x.grad, None

"""Activation checkpointing of differentiated forwards (arXiv 2604.15311, Sec. 4.2).

Three settings with the same gradient: "all" keeps the whole graph, "blocks" the inputs of the model's blocks (the
model's own gradient checkpointing), "inputs" only the model's inputs, and in the recomputed forward the blocks' inputs
(`checkpoint_blocks` switches the model's part on). In training each differentiated forward has its own backward under
all three (`with_graph`).

`recomputed` is for methods that know a velocity's value already: it runs no forward until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.errors import UserError
from leapalign.flow.anchor import Anchor, Deviation, apart
from leapalign.flow.rollout import Velocity

Around: TypeAlias = "Callable[[], AbstractContextManager[None]]"
Part: TypeAlias = "Callable[[list[int]], Velocity]"  # the velocity of some of a micro-batch's samples, by their places


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


def checkpoint_blocks(policy: object, graph: str) -> bool:
    """Switch on the policy's own checkpointing if `graph` uses it; return whether it is on now.

    "blocks" needs it; "inputs" takes it where there is one: a recomputed forward then holds the inputs of its blocks
    and one block's graph instead of its whole graph, and each block is computed three times instead of two.
    Raises UserError for "blocks" without it.
    """
    if isinstance(policy, CheckpointsBlocks):
        if graph != "all":
            policy.enable_gradient_checkpointing()
        return graph != "all"
    if graph == "blocks":
        raise UserError(f"graph=blocks: {type(policy).__name__} cannot checkpoint its blocks; use graph=inputs")
    return False


@runtime_checkable
class Recomputes(Protocol):
    """A velocity whose known values can get their graph in the backward pass."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def recomputed(self, x: Tensor, sigma: Tensor, v: Tensor, share: float) -> Tensor:
        """Return `v`, the value of this velocity at (x, sigma), with its graph; see the function `recomputed`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainedVelocity:
    """A velocity for training: each differentiated forward has its own backward, with the anchor's gradient."""

    velocity: Velocity  # without settings of the graph
    differentiated: Velocity  # the same, with activations kept as `graph` says
    recomputation: Around = nullcontext  # wraps a forward that runs in the backward pass
    anchor: Anchor | None = None
    before: Callable[[], None] = lambda: None  # called before each forward of the rollout
    staleness: list[Tensor] | None = None  # gets mean |v - v of the rollout| [B] of each recomputed forward
    part: Part | None = None  # leaves samples whose gradient is zero out of recomputed forwards; None: takes all
    drifts: list[Tensor] = field(default_factory=list)  # [B] of each measured state; see `drift`
    waiting: list[Deviation] = field(default_factory=list)  # states that need the batch's mean, in the method's order

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.before()
        if not torch.is_grad_enabled():
            return self.velocity(x, sigma)
        v = self.differentiated(x, sigma)
        state = self._held(x, sigma)
        if self.anchor is None or state is None:
            return v
        self.measure([state], [v])
        if x.requires_grad:
            return self.anchor.pulled_apart(v, state, self.again)
        return self.anchor.pulled(v, state)

    def recomputed(self, x: Tensor, sigma: Tensor, v: Tensor, share: float) -> Tensor:
        state, nested = self._held(x, sigma, share, v), x.requires_grad
        x = x if nested else x.detach().requires_grad_()  # autograd's condition for calling backward
        return cast("Tensor", _Recomputed.apply(self, state, nested, x, sigma, v))

    def measure(self, states: Sequence[Deviation], values: Sequence[Tensor]) -> None:
        """Measure the deviation from the base at states where this velocity has these values."""
        assert self.anchor is not None
        self.drifts.extend(self.anchor.measure(self.velocity, states, values))

    def drift(self) -> Tensor:
        """Return the mean drift over the states measured since the last call, [B] (0-dim 0 if none)."""
        drift = torch.stack(self.drifts).mean(0) if self.drifts else torch.zeros(())
        self.drifts.clear()
        return drift

    def _held(self, x: Tensor, sigma: Tensor, share: float = 1.0, known: Tensor | None = None) -> Deviation | None:
        """Return the deviation at a state that the anchor holds, not yet measured; None if it holds no such state."""
        if self.anchor is None or not self.anchor.pulls_at(x):
            return None
        state = Deviation(x=x.detach(), sigma=sigma, share=share, known=known)
        if self.anchor.across:
            self.waiting.append(state)
        return state

    def again(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Run the differentiated forward in the backward pass."""
        with self.recomputation():
            return own_backward(self.velocity)(x, sigma)


def with_graph(
    velocity: Velocity,
    graph: str,
    recomputation: Around = nullcontext,
    anchor: Anchor | None = None,
    before: Callable[[], None] = lambda: None,
    staleness: list[Tensor] | None = None,
    part: Part | None = None,
) -> TrainedVelocity:
    """Return the velocity for training with this setting of `graph`; the other arguments: see `TrainedVelocity`."""
    return TrainedVelocity(
        velocity=velocity,
        differentiated=inputs_only(velocity, recomputation) if graph == "inputs" else own_backward(velocity),
        recomputation=recomputation,
        anchor=anchor,
        before=before,
        staleness=staleness,
        part=part,
    )


def recomputed(velocity: Velocity, x: Tensor, sigma: Tensor, v: Tensor, share: float = 1.0) -> Tensor:
    """Return `v` [B, ...], the known value of `velocity(x, sigma)`, with the graph of that velocity.

    The forward runs in the backward pass, with the weights of that time, and is freed there: nothing is kept but x,
    sigma and v. `share`: factor on the anchor's gradient, 1 / M if M such terms are averaged.
    As with `own_backward`, the gradient goes into the weights' .grad.
    """
    trained = velocity if isinstance(velocity, Recomputes) else with_graph(velocity, "all")
    return trained.recomputed(x, sigma, v, share)


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

    Only one forward's graph exists at a time, for any number of leaps: the graph of a whole forward, or, if the policy
    checkpoints its blocks as well (`checkpoint_blocks`), their inputs and the graph of one.

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


class _Recomputed(torch.autograd.Function):
    """A known value, whose forward runs in the backward pass."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        trained: TrainedVelocity,
        state: Deviation | None,
        nested: bool,
        x: Tensor,
        sigma: Tensor,
        v: Tensor,
    ) -> Tensor:
        ctx.constants = (trained, state, nested, x.detach(), sigma, v)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        trained, state, nested, x, sigma, v = ctx.constants
        if trained.part is None or state is not None:  # the anchor gives all samples a gradient
            at_x = _replay(trained, state, nested, x, sigma, v, grad)
        else:
            at_x = _replay_part(trained, nested, x, sigma, v, grad)
        return None, None, None, at_x, None, None


def _replay(
    trained: TrainedVelocity,
    state: Deviation | None,
    nested: bool,
    x: Tensor,
    sigma: Tensor,
    known: Tensor,
    grad: Tensor,
) -> Tensor | None:
    """Run the forward at (x, sigma) and backpropagate `grad`, with the anchor's, into .grad; return that at x."""
    x = x.requires_grad_()
    with torch.enable_grad():
        v = trained.again(x, sigma)
    if trained.staleness is not None:
        trained.staleness.append((v.detach() - known).abs().flatten(1).mean(1))
    pull = None
    if trained.anchor and state:
        if state.difference is None:
            trained.measure([state], [v])
        pull = trained.anchor.gradient(state)
    torch.autograd.backward(v, grad if pull is None or nested else grad + pull)
    if pull is not None and nested:
        apart(trained.again, x, sigma, pull)
    return x.grad


def _replay_part(
    trained: TrainedVelocity, nested: bool, x: Tensor, sigma: Tensor, known: Tensor, grad: Tensor
) -> Tensor:
    """`_replay`, without anchor, of the samples whose `grad` is not zero; the others' staleness is 0.

    If none has, one sample runs all the same, because ranks with sharded weights run their forwards together.
    """
    assert trained.part is not None
    rows = grad.flatten(1).any(1).nonzero().flatten()
    rows = rows if len(rows) else rows.new_zeros(1)
    few = with_graph(trained.part(rows.tolist()), "all", trained.recomputation, staleness=trained.staleness)
    at_x = _replay(few, None, nested, x[rows], sigma[rows] if sigma.ndim else sigma, known[rows], grad[rows])
    if few.staleness:
        few.staleness[-1] = few.staleness[-1].new_zeros(len(x)).index_copy(0, rows, few.staleness[-1])
    return torch.zeros_like(x) if at_x is None else torch.zeros_like(x).index_copy(0, rows, at_x)

"""Measure the bytes of one micro-batch's graph: the run's own method and model compute on fake tensors.

The method runs as in training; forwards without a graph, which save nothing, are skipped except one. A policy of many
equal blocks is measured with one block of each kind and again with two: saved bytes and peaks grow by the same amount
with each further equal block, so the rest is a multiplication. benches/plan.py compares the result with a real run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.flow.anchor import Anchor
from leapalign.flow.graph import TrainedVelocity, checkpoint_blocks, with_graph
from leapalign.methods.base import Method
from leapalign.methods.policy_gradient import PolicyGradient
from leapalign.models.base import Conditioning
from leapalign.planning.forwards import draw, rolled_out, train_kept
from leapalign.planning.tensor_bytes import LiveBytes, Saved
from leapalign.run import Run

GRAPHS = ("all", "blocks", "inputs")
ENOUGH = 1  # blocks of each kind in the first measurement


@dataclass(frozen=True, kw_only=True)
class GraphBytes:
    """Bytes that one micro-batch needs, without weights and their gradients."""

    kept: int  # saved for the backward at the end of the rollout
    rollout: int  # peak of the rollout
    backward: int  # peak of the backward through the model

    def plus(self, other: GraphBytes, times: int) -> GraphBytes:
        return GraphBytes(
            kept=self.kept + times * other.kept,
            rollout=self.rollout + times * other.rollout,
            backward=self.backward + times * other.backward,
        )


# Bytes


def graph_bytes(
    run: Run,
    model: Any,
    conditioning: Conditioning,
    mode: FakeTensorMode,
    graph: str,
    seed: int,
    waits: bool = False,
) -> GraphBytes:
    """Measure one micro-batch with this setting of the graph (one of `GRAPHS`) and the draws of `seed`.

    `waits`: only inputs are kept, and `graph` is that of the policy's blocks (leapalign.training.batch_mean).
    """
    _fill_tables(run, model, conditioning, mode)
    checkpointed, kept = checkpoint_blocks(model.policy, graph), "inputs" if waits else graph
    try:
        return _over_blocks(model.policy, lambda: _measure(run, model, conditioning, mode, kept, seed))
    finally:
        if checkpointed:
            model.policy.disable_gradient_checkpointing()


def forward_bytes(run: Run, model: Any, conditioning: Conditioning, mode: FakeTensorMode) -> int:
    """Return the peak bytes of one velocity call without a graph."""

    def measured() -> GraphBytes:
        with LiveBytes() as live:
            live.begin("forward")
            _forward(run, model, conditioning, mode)
        return GraphBytes(kept=0, rollout=live.peaks()["forward"], backward=0)

    _fill_tables(run, model, conditioning, mode)
    return _over_blocks(model.policy, measured).rollout


@torch.no_grad()
def _forward(run: Run, model: Any, conditioning: Conditioning, mode: FakeTensorMode) -> None:
    with mode:
        x, sigma = torch.zeros(run.micro_batch_size, *model.latent_shape), torch.ones(())
    model.velocity(conditioning)(x, sigma)


def _fill_tables(run: Run, model: Any, conditioning: Conditioning, mode: FakeTensorMode) -> None:
    """Run one forward first, so that position tables that a model caches count in no measurement."""
    groups = equal_blocks(model.policy)
    with shortened(groups, [ENOUGH] * len(groups)):
        _forward(run, model, conditioning, mode)


def _over_blocks(policy: nn.Module, measured: Callable[[], GraphBytes]) -> GraphBytes:
    """Extrapolate `measured` to all blocks, from one block of each kind and from a second one of each."""
    groups = equal_blocks(policy)
    with shortened(groups, [ENOUGH] * len(groups)):
        total = base = measured()
    for i, group in enumerate(groups):
        with shortened(groups, [ENOUGH + (i == j) for j in range(len(groups))]):
            total = total.plus(measured().plus(base, -1), len(group.places) - ENOUGH)
    return total


def _measure(
    run: Run, model: Any, conditioning: Conditioning, mode: FakeTensorMode, graph: str, seed: int
) -> GraphBytes:
    velocity = with_graph(model.velocity(conditioning), graph, anchor=anchor_of(run))
    shape = (run.micro_batch_size, *model.latent_shape)
    with mode:
        x = torch.zeros(shape)
    draws = draw(run, seed, lambda n: x.new_zeros(n, *shape))
    sigmas = torch.linspace(0, 1, run.num_sampling_steps + 1)
    parameters = list(model.policy.parameters())
    if isinstance(run.method, PolicyGradient):
        return _measure_policy_gradient(run.method, velocity, x, sigmas, draws, parameters)
    saved = Saved([*parameters, *model.policy.buffers()])
    with LiveBytes() as live:
        live.begin("rollout")
        skipping = Skipping(velocity, sigmas[1])
        with saved.hooks:
            surrogate = cast("Method[Any]", run.method)(skipping, x, sigmas, draws)
        kept = saved.bytes()
        live.begin("backward")
        if surrogate.has_gradient:
            surrogate.backward(torch.zeros_like(surrogate.x_hat))
    gradients = [p.grad for p in parameters if p.grad is not None]
    peaks = live.peaks(without=gradients)
    model.policy.zero_grad(set_to_none=True)
    return GraphBytes(kept=kept, rollout=peaks["rollout"], backward=peaks["backward"])


def _measure_policy_gradient(
    method: PolicyGradient, velocity: TrainedVelocity, x: Tensor, sigmas: Tensor, draws: Any, parameters: list[Any]
) -> GraphBytes:
    """Measure one rollout and one trained step. `kept`: the states that are trained, until their update."""
    with LiveBytes() as live:
        live.begin("rollout")
        trajectory = rolled_out(method, Skipping(velocity, sigmas[1]), x, sigmas, draws)
        live.begin("backward")
        train_kept(method, velocity, trajectory, 1)
    peaks = live.peaks(without=[p.grad for p in parameters if p.grad is not None])
    for p in parameters:
        p.grad = None
    tensors = {id(t): t for step in trajectory.steps for t in step if isinstance(t, Tensor)}
    kept = sum(t.numel() * t.element_size() for t in tensors.values())
    return GraphBytes(kept=kept, rollout=peaks["rollout"], backward=peaks["backward"])


def anchor_of(run: Run) -> Anchor | None:
    """Return the run's velocity anchor, with weights in place of the base's: its activations are the same."""
    if not run.anchored:
        return None
    nested = run.anchor_states == "all"
    return Anchor(weight=run.anchor_weight, reference=nullcontext, batch_size=run.batch_size, nested=nested)


class Skipping:
    """A velocity that returns zeros for calls without a graph, whose values do not change the measured bytes.

    The last step's call is run: there a rollout without graph meets the most that it has kept.
    """

    def __init__(self, velocity: TrainedVelocity, last: Tensor) -> None:
        self.velocity, self.last = velocity, float(last)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if torch.is_grad_enabled() or float(sigma.flatten()[0]) == self.last:
            return self.velocity(x, sigma)
        return torch.zeros_like(x)

    def recomputed(self, x: Tensor, sigma: Tensor, v: Tensor, share: float) -> Tensor:
        return self.velocity.recomputed(x, sigma, v, share)


def latent_bytes(
    model: Any, mode: FakeTensorMode, rows: int, score: Callable[[Tensor], Sequence[Tensor]], *, gradient: bool
) -> int:
    """Return the peak bytes of decoding and scoring `rows` latents and, with `gradient`, of its gradient at them."""
    with mode:
        latents = torch.zeros(rows, *model.latent_shape).requires_grad_(gradient)
    with LiveBytes() as live, torch.set_grad_enabled(gradient):
        live.begin("reward")
        total = sum(each.float().sum() for each in score(model.decode(latents)))
        if gradient:
            torch.autograd.grad(total, latents)  # pyright: ignore  # `score` returns at least one tensor
    return live.peaks()["reward"]


# Equal blocks


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of one module list whose weights have equal shapes."""

    parent: nn.Module
    name: str  # the list's name in its parent
    places: range  # indices in the list


def equal_blocks(policy: nn.Module) -> list[Group]:
    """Find groups of more than `ENOUGH` consecutive equal blocks, in the model's order."""
    groups = []
    for parent in policy.modules():
        for name, blocks in parent.named_children():
            if isinstance(blocks, nn.ModuleList):
                groups += [Group(parent, name, run) for run in _runs([_shapes(block) for block in blocks])]
    return [group for group in groups if len(group.places) > ENOUGH]


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())


def _runs(kinds: Sequence[Any]) -> Iterator[range]:
    start = 0
    for place in range(1, len(kinds) + 1):
        if place == len(kinds) or kinds[place] != kinds[start]:
            yield range(start, place)
            start = place


@contextmanager
def shortened(groups: Sequence[Group], lengths: Sequence[int]) -> Iterator[None]:
    """Keep only the first `lengths[i]` blocks of each group while the context is open."""
    lists = {(group.parent, group.name): list(getattr(group.parent, group.name)) for group in groups}
    dropped = {(g.parent, g.name, place) for g, length in zip(groups, lengths) for place in g.places[length:]}
    try:
        for (parent, name), blocks in lists.items():
            kept = [block for place, block in enumerate(blocks) if (parent, name, place) not in dropped]
            setattr(parent, name, nn.ModuleList(kept))
        yield
    finally:
        for (parent, name), blocks in lists.items():
            setattr(parent, name, nn.ModuleList(blocks))

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
from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Method, Samples
from leapalign.methods.policy_gradient import PolicyGradient, Trajectory
from leapalign.models.base import Conditioning
from leapalign.planning.tensor_bytes import LiveBytes, Saved
from leapalign.run import Run
from leapalign.seeds import generator

GRAPHS = ("all", "blocks", "inputs")
TRIALS = 64  # draws tried to find the largest graph and the mean number of forwards
MANY = 10**9  # more than any rollout has
ENOUGH = 1  # blocks of each kind in the first measurement


@dataclass(frozen=True, kw_only=True)
class Forwards:
    """Number of velocity calls for one micro-batch."""

    mean: float  # over draws; all that the method asks for, with and without graph
    most_with_graph: int
    nested: int  # of these, calls at a state with gradient
    in_backward: int  # of these, calls that run in the backward pass only
    seed: int  # of a draw with `most_with_graph` calls
    copies: int  # copies of the batch that the reward scores
    updates: int = 1  # updates over which these forwards are spread: those of one rollout, for policy gradients

    def of_anchor(self, states: str) -> tuple[int, int]:
        """Return the forwards that the velocity anchor adds at these states of the run, and the backwards."""
        if states == "first":
            return self.most_with_graph - self.nested, 0
        return self.most_with_graph + self.nested, self.nested  # nested: the base's forward, and one for the pull alone


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


# Number of forwards


def count_forwards(run: Run) -> Forwards:
    """Count velocity calls by running the method on scalars with `TRIALS` draws, which make all its random choices."""
    trials = [_trial(run, seed) for seed in range(TRIALS)]
    seed = max(range(TRIALS), key=lambda i: trials[i][0].with_graph)
    counts, copies = trials[seed]
    return Forwards(
        mean=sum(calls.number for calls, _ in trials) / TRIALS,
        most_with_graph=counts.with_graph,
        nested=counts.nested,
        in_backward=counts.in_backward,
        seed=seed,
        copies=copies,
        updates=run.updates_per_rollout if isinstance(run.method, PolicyGradient) else 1,
    )


class Counting:
    """A velocity of one weight that counts its calls."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)
        self.number = self.with_graph = self.nested = self.in_backward = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        graph = torch.is_grad_enabled()
        self._count(graph, graph and x.requires_grad)
        return x * self.weight

    def recomputed(self, x: Tensor, sigma: Tensor, v: Tensor, share: float) -> Tensor:
        self._count(True, x.requires_grad)
        self.in_backward += 1
        return x * self.weight

    def _count(self, graph: bool, nested: bool) -> None:
        self.number, self.with_graph, self.nested = self.number + 1, self.with_graph + graph, self.nested + nested


def _trial(run: Run, seed: int) -> tuple[Counting, int]:
    """Return the calls of one micro-batch of this draw, and the number of copies that the reward scores."""
    velocity, sigmas = Counting(), torch.linspace(0, 1, run.num_sampling_steps + 1)
    rows = run.micro_batch_size
    draws = draw(run, seed, lambda n: torch.zeros(n, rows, 1))
    if isinstance(run.method, PolicyGradient):
        train_kept(run.method, velocity, rolled_out(run.method, velocity, torch.zeros(rows, 1), sigmas, draws))
        return velocity, 1
    surrogate = cast("Method[Any]", run.method)(velocity, torch.zeros(rows, 1), sigmas, draws)
    return velocity, surrogate.copies


@torch.no_grad()
def rolled_out(method: PolicyGradient, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Any) -> Trajectory:
    """Roll out as training does."""
    return method.roll_out(velocity, x, sigmas, draws)


def train_kept(method: PolicyGradient, velocity: Velocity, trajectory: Trajectory, steps: int = MANY) -> None:
    """Run forwards and backwards of the first `steps` kept steps; their losses' values do not matter."""

    @torch.no_grad()
    def base(x: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x, sigma)

    for kept in trajectory.steps[:steps]:
        method.loss(velocity, base, kept, torch.ones(len(trajectory.x_0))).loss.sum().backward()


def draw(run: Run, seed: int, noise: Callable[[int], Tensor]) -> Any:
    samples = Samples(count=run.micro_batch_size, noise=noise)
    return run.method.draw(run.num_sampling_steps, generator(seed, step=0, sample=0, purpose="plan"), samples)


# Bytes


def graph_bytes(
    run: Run, model: Any, conditioning: Conditioning, mode: FakeTensorMode, graph: str, seed: int
) -> GraphBytes:
    """Measure one micro-batch with this setting of the graph (one of `GRAPHS`) and the draws of `seed`."""
    _fill_tables(run, model, conditioning, mode)
    checkpointed = checkpoint_blocks(model.policy, graph)
    try:
        return _over_blocks(model.policy, lambda: _measure(run, model, conditioning, mode, graph, seed))
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
        return _measure_policy_gradient(run, velocity, x, sigmas, draws, parameters)
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
    run: Run, velocity: TrainedVelocity, x: Tensor, sigmas: Tensor, draws: Any, parameters: list[Any]
) -> GraphBytes:
    """Measure one rollout and one trained step. `kept`: states of all micro-batches of a batch, for its updates."""
    method = cast("PolicyGradient", run.method)
    with LiveBytes() as live:
        live.begin("rollout")
        trajectory = rolled_out(method, Skipping(velocity, sigmas[1]), x, sigmas, draws)
        live.begin("backward")
        train_kept(method, velocity, trajectory, 1)
    peaks = live.peaks(without=[p.grad for p in parameters if p.grad is not None])
    for p in parameters:
        p.grad = None
    tensors = {id(t): t for step in trajectory.steps for t in step if isinstance(t, Tensor)}
    one = sum(t.numel() * t.element_size() for t in tensors.values())
    others = one * (run.batch_size // run.micro_batch_size - 1)
    return GraphBytes(kept=one + others, rollout=peaks["rollout"] + others, backward=peaks["backward"] + others)


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

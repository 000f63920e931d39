"""Count the forwards of one micro-batch, by running the run's own method on scalars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Method, Samples
from leapalign.methods.policy_gradient import PolicyGradient, Trajectory
from leapalign.run import Run
from leapalign.seeds import generator

TRIALS = 64  # draws tried to find the largest graph and the mean number of forwards
MANY = 10**9  # more than any rollout has


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

    def held(self, states: str) -> int:
        """Return the number of states that the velocity anchor holds, at these states of the run."""
        return self.most_with_graph - (self.nested if states == "first" else 0)

    def of_mean(self, graph: str) -> int:
        """Return the forwards that waiting for the mean of the batch adds to a run with this setting of the graph."""
        return 0 if graph == "inputs" else self.most_with_graph - self.in_backward

    def of_anchor(self, states: str) -> tuple[int, int]:
        """Return the forwards that the velocity anchor adds at these states of the run, and the backwards."""
        if states == "first":
            return self.most_with_graph - self.nested, 0
        return self.most_with_graph + self.nested, self.nested  # nested: the base's forward, and one for the pull alone


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

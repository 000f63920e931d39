"""The protocol of direct-gradient methods: explicit draws in, a surrogate out (arXiv 2604.15311, Algorithm 1).

A method rolls out the noise, with a few differentiated forwards *inside* the rollout, and returns a surrogate: the
latent that the reward sees, with the graph that carries the reward's gradient to the weights.
Modules of this package import no torch, so that command-line help stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar, runtime_checkable

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Noise: TypeAlias = "Callable[[int], Tensor]"
Draws = TypeVar("Draws")


def _no_noise(n: int) -> Tensor:
    raise UserError("this method draws noise of its own: give Samples(noise=...), a function n -> [n, B, ...]")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The B samples of one call, as `Method.draw` needs to know them."""

    count: int  # B
    noise: Noise = _no_noise  # noise(n) -> standard normal [n, B, ...], a function of each sample
    first: int = 0  # place of the first one among the samples that share `rng`
    sharing: int = 0  # number of samples that share `rng`; 0 = these alone
    rollouts: int = 0  # rollouts of the run before this one, for methods that have a schedule

    @property
    def rows(self) -> slice:
        """Places of these samples among those that share `rng`."""
        return slice(self.first, self.first + self.count)


class Method(Protocol[Draws]):
    """A frozen dataclass of settings that is called as a function.

    `draw` makes every random choice of one call from `rng` and `samples.noise`, so that a call is a function of its
    arguments. Several calls may share one state of `rng`, for the micro-batches of a batch: what differs between
    samples is drawn for all `samples.sharing` of them. `__call__` takes the noise x_T [B, ...] and an ascending grid
    [T + 1].
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]
    same_forwards: ClassVar[bool]
    """True if every draw runs the same number of forwards, with and without graph: ranks with sharded weights, which
    gather together, may then have different draws."""

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> Draws: ...

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Draws) -> Surrogate: ...


@runtime_checkable
class ReusesRollouts(Protocol):
    """A method that can train several updates on one rollout."""

    def surrogates(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Sequence[Any]) -> list[Surrogate]:
        """Roll out once and return a surrogate for each of the draws.

        Their forwards run in their backward passes, with the weights of that time; values are those of the rollout.
        """
        ...


@runtime_checkable
class ClipsGradients(Protocol):
    """A method that clips the samples' gradients at the latent by those of the whole batch, on all ranks."""

    def ceiling(self, norms: Sequence[float]) -> float:
        """Return the largest norm that a sample's gradient keeps, from the norms of all samples of the update."""
        ...


@runtime_checkable
class NeedsAnchor(Protocol):
    """A method that is not defined without the velocity anchor."""

    def check_anchor(self, weight: float) -> None:
        """Raise UserError if `Run.anchor_weight` does not suit the method."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BySteps:
    """What a method measured for each sample and each of its M sets of steps: [M, B] each, without graph."""

    steps: dict[str, Tensor]  # the steps of a set, by name (k, j)
    values: dict[str, Tensor]  # distances, weights
    gradients: Callable[[], dict[str, Tensor]]
    """Norms of the loss's gradient at the velocities; 0 before `Surrogate.backward`. As for the sample's own loss and
    one set alone, but for the division by the batch's size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
    """A method's result for the objective: N = copies * B rows, in blocks of B (row n belongs to sample n % B)."""

    x_hat: Tensor  # [N, ...]: the latent that the reward sees, with the method's graph
    weight: Tensor  # [N], without graph
    copies: int = 1  # DRaFT-LV: 1 + n; the loss sums over the copies
    x_0: Tensor | None = None  # [B, ...] the real rollout's end, without graph; None if the rollout stops early
    metrics: dict[str, Tensor] = field(default_factory=dict)  # 0-dim (draws) or [B] (distances), without graph
    by_steps: BySteps | None = None  # None: the method measures nothing by steps

    @property
    def has_gradient(self) -> bool:
        """False if the draw left no differentiated step (DRTune, AlignProp): the update is skipped and counted."""
        return self.x_hat.requires_grad

    def backward(self, grad: Tensor) -> None:
        """Backpropagate the loss's gradient at x_hat, [N, ...], through the method's graph into the weights' .grad.

        Does nothing if the surrogate has no graph.
        """
        if self.has_gradient:
            self.x_hat.backward(grad.to(self.x_hat.dtype))  # the reward may have run in another dtype


def uniform_integer(low: int, high: int, rng: torch.Generator) -> int:
    """Draw an integer from {low..high}, both included."""
    import torch

    return int(torch.randint(low, high + 1, (), generator=rng, device=rng.device))


def early_stop_range(num_steps: int, fraction: float) -> int:
    """Return m of Algorithm 1, t_min ~ U{1..m}: `fraction` of T steps (paper: 11 of 25, App. E), at least 1."""
    return max(1, round(fraction * num_steps))


def check_fraction(owner: str, field_name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{owner}: got {field_name}={value}, expected a share of the T steps in (0, 1]; try {11 / 25}")


def check_positive(owner: str, field_name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{owner}: got {field_name}={value}, expected at least 1; use {field_name}=1 or more")

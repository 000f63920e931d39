"""The protocol of policy-gradient methods: rollouts without graph, group advantages, a loss for each trained step.

A method rolls the noise out without gradient and keeps what it trains on (a `Trajectory`). When the whole batch is
scored, each sample gets an advantage: how much better it is than others of its prompt. Then the method returns, for
each kept step, a loss that a forward with gradient computes. Rewards need no gradient. The loop is
training/policy_gradient.py.

Advantages (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818): A = (r - mean of the group) / (std + eps), with
the std of the group or of the whole batch. Several rewards: each is normalised by itself, then they are summed with
their weights (MixGRPO, arXiv 2507.21802), so that no reward dominates by its scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from leapalign.errors import UserError
from leapalign.methods.base import Samples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from leapalign.flow.rollout import Velocity

Draws = TypeVar("Draws", contravariant=True)
Kept = TypeVar("Kept")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A rollout of B samples, without graph."""

    x_0: Tensor  # [B, ...], which is decoded and scored
    steps: Sequence[Any]  # what the method keeps of each trained step, with its own states of each sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """The loss of one trained step."""

    loss: Tensor  # [B], with graph; its mean over samples and steps is the batch's loss
    log_ratio: Tensor | None = None  # [B] log of new over old probability, without graph; 0 before the first update
    metrics: dict[str, Tensor] = field(default_factory=dict)  # [B] each, without graph


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How rewards become advantages."""

    std: Literal["group", "batch"] = "group"  # whose standard deviation divides
    eps: float = 1e-8  # added to it
    correction: int = 1  # 1: sample std (n - 1); 0: population std


@runtime_checkable
class PolicyGradient(Protocol[Draws]):
    """A frozen dataclass of settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]
    same_forwards: ClassVar[bool]
    """True if every draw runs the same number of forwards, with and without graph; as for `Method`."""
    normalisation: ClassVar[Normalisation]

    @property
    def same_noise(self) -> bool:
        """True if the samples of one prompt begin with the same noise."""
        ...

    @property
    def needs_base(self) -> bool:
        """True if `loss` calls the base's velocity."""
        ...

    @property
    def advantage_limit(self) -> float:
        """Largest absolute advantage; larger ones are clamped."""
        ...

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> Any:
        """Make every random choice of one rollout; as for `Method.draw`."""
        ...

    def roll_out(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Draws) -> Trajectory:
        """Roll out the noise x [B, ...] on an ascending grid [T + 1]. Called without gradient."""
        ...

    def loss(self, velocity: Velocity, base: Velocity, step: Any, advantages: Tensor) -> Term:
        """Return the loss of a kept step. `base`: the base's velocity, without graph; `advantages`: [B]."""
        ...


@runtime_checkable
class SamplesFromAverage(Protocol):
    """A policy-gradient method that rolls out with the averaged weights, and averages them its own way."""

    def average_decay(self, rollouts: int) -> float:
        """Return the decay of the average after this many rollouts, which are one update each."""
        ...


def normalised(rewards: Tensor, groups: Tensor, settings: Normalisation) -> Tensor:
    """Return (r - mean of the group) / (std + eps): [B] in the rewards' dtype. `groups`: [B], the group of each."""
    whole = rewards.std(correction=settings.correction)
    result = rewards.clone()
    for group in groups.unique():
        rows = groups == group
        own = rewards[rows]
        std = own.std(correction=settings.correction) if settings.std == "group" else whole
        result[rows] = (own - own.mean()) / (std + settings.eps)
    return result


def advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, settings: Normalisation
) -> Tensor:
    """Return the weighted sum of the rewards, each normalised by itself: [B]."""
    parts = [weights[name] * normalised(r, groups, settings) for name, r in rewards.items()]
    return sum(parts[1:], parts[0])


def clipped(advantages: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """Return PPO's max(-A rho, -A clip(rho, 1 - c, 1 + c)) (arXiv 1707.06347): [B], with rho's graph."""
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def check_positive_reals(owner: str, **values: float) -> None:
    """Raise UserError for a setting that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{owner}: got {name}={value}, expected a positive number")


def check_at_least(owner: str, least: float, **values: float) -> None:
    """Raise UserError for a setting below `least`."""
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{owner}: got {name}={value}, expected at least {least:g}")

"""LeapAlign (arXiv 2604.15311, Sec. 4, Algorithm 1): the reward's gradient through a few leaps along the rollout.

Claim: two leaps x_k -> x_j -> x_0 at random steps k > j train any step at constant memory, because the latent
connectors give the leaps the real rollout's values, and the discount keeps the nested gradient from exploding:

    dx_0/dtheta = -j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv(x_j)/dx dv(x_k)/dtheta    (Eq. 10)

Our choices, where the paper states none:
- n leaps: a connector at every landing, alpha at every input but the first, weight = 1 / sum of the floored distances.
- `timestep_range` and `leap_distance` are fractions of the T step indices, not of sigma: the paper draws k and j from
  the indices {1..T}, so the meaning does not depend on the grid's shift.
- `nested_only` with more than two leaps cuts the single-step term of the first leap alone.
Departures: the hinge (text) instead of Algorithm 1's plain reward, see objective.py; rounding, see flow/leap.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from leapalign.errors import UserError
from leapalign.flow.leap import connect, discount, leap, mean_distance
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import Noise, Surrogate, check_positive, uniform_integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weighting = Literal["both", "d_j", "d_0", "none"]
RewardInput = Literal["x_0", "x_hat"]


class LeapTrajectory(NamedTuple):
    """The two end points that the reward may see, and each leap's distance from the real state."""

    x_0: Tensor  # [B, ...] the real rollout's end, without graph
    x_hat: Tensor  # [B, ...] the last leap's prediction, with the graph of all leaps
    distances: list[Tensor]  # [B] per leap, noisiest first; the last is d_0


def leap_trajectory(
    velocity: Velocity, x: Tensor, sigmas: Tensor, steps: tuple[int, ...], alpha: float, nested_only: bool = False
) -> LeapTrajectory:
    """Roll out `x` = x_T in T forwards; those at `steps` (noisiest first) keep their graph and are joined by leaps."""
    landing = dict(zip(steps, (*steps[1:], 0)))  # k -> j -> 0
    x_hat, distances = x, []
    for t in range(grid_steps(sigmas, x), 0, -1):
        if t in landing:
            x_t = connect(x_hat, x)  # Eq. 6; before the first leap x_hat is the noise, a constant
            v = velocity(discount(x_t, alpha), sigmas[t])  # Eq. 9
            bare = x_t.detach() if nested_only and t == steps[1] else x_t  # Eq. 14: no single-step term at k
            x_hat = leap(bare, v, sigmas[t], sigmas[landing[t]])  # Eqs. 4, 5
        else:
            v = without_graph(velocity, x, sigmas[t])
        x = euler_step(x, v.detach(), sigmas[t], sigmas[t - 1])  # the real rollout is a constant (App. G)
        if t - 1 in landing.values():
            distances.append(mean_distance(x, x_hat))  # before the connector makes them equal
    return LeapTrajectory(x, x_hat, distances)


def similarity_weight(distances: list[Tensor], tau: float, weighting: Weighting) -> Tensor:
    """Return w_sim = 1 / (max(d_j, tau) + max(d_0, tau)) [B] (Eq. 12), or its ablations (Fig. 4d). Distances: [B]."""
    chosen = {"both": distances, "d_j": distances[:-1], "d_0": distances[-1:], "none": []}[weighting]
    if not chosen:
        return distances[-1].new_ones(distances[-1].shape)
    return 1 / sum(d.clamp(min=tau) for d in chosen)  # type: ignore[return-value]


class LeapDraws(NamedTuple):
    """The step indices that leap, noisiest first: (k, j) for two leaps."""

    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LeapAlign:
    """LeapAlign with n leaps and the switches of the paper's ablations (Fig. 4, App. C). Defaults are the paper's."""

    name: ClassVar[str] = "leapalign"
    same_forwards: ClassVar[bool] = True

    num_leaps: int = 2
    """Leaps of the shortened trajectory (Fig. 4b)."""
    nested_scale: float = 0.3  # alpha, Eq. 9
    """Factor on the nested gradient, in [0, 1] (alpha; 0.3 for HPSv2.1, 0.1 for PickScore and HPSv3)."""
    distance_floor: float = 0.1  # tau, Eq. 12
    """Lower bound of the distances in the weight (tau); presumes latents of about unit variance."""
    weighting: Weighting = "both"  # Fig. 4d
    """Distances behind a sample's weight: all, those at the intermediate landings, the one at x_0, none."""
    reward_input: RewardInput = "x_0"  # Fig. 4c
    """Image that the reward sees: the rollout's, or the last leap's prediction of it."""
    timestep_range: tuple[float, float] = (0.0, 1.0)  # Fig. 4e
    """Steps that may leap, as shares of the T steps counted from the image: low < t / T <= high."""
    leap_distance: float = 0.0  # Fig. 4f; the paper's "fixed distance" is 0.5
    """Share of the T steps between neighbouring leaps; 0 draws the steps at random."""
    nested_only: bool = False  # Eq. 14
    """Train the first leap through the nested gradient only."""

    def __post_init__(self) -> None:
        check_positive("LeapAlign", "num_leaps", self.num_leaps)
        _check_numbers(self)
        _check_choices(self)

    def draw(self, num_steps: int, rng: torch.Generator, noise: Noise) -> LeapDraws:
        """Draw n different step indices, uniform in the timestep range, or evenly spaced from a uniform lowest one."""
        low, high = (floor(share * num_steps + 1e-9) for share in self.timestep_range)  # 0.29 * 100 is 28.999…
        spacing = max(1, round(self.leap_distance * num_steps)) if self.leap_distance else 1
        span = (self.num_leaps - 1) * spacing  # between the first leap and the last
        if high - low <= span:
            raise UserError(
                f"LeapAlign: {self.num_leaps} leaps need {span + 1} steps, but timestep_range {self.timestep_range} of "
                f"{num_steps} sampling steps holds {max(0, high - low)}; raise the number of sampling steps, widen "
                "timestep_range, or lower num_leaps or leap_distance"
            )
        if self.leap_distance:
            last = uniform_integer(low + 1, high - span, rng)
            return LeapDraws(tuple(last + i * spacing for i in reversed(range(self.num_leaps))))
        return LeapDraws(_without_replacement(low + 1, high, self.num_leaps, rng))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: LeapDraws) -> Surrogate:
        """Run T forwards, n with graph. Metrics: the steps k, j (j1, j2, ... for more leaps), d_j and d_0 [B]."""
        steps = draws.steps
        self._check_draws(steps, grid_steps(sigmas, x))
        x_0, x_hat, distances = leap_trajectory(velocity, x, sigmas, steps, self.nested_scale, self.nested_only)
        return Surrogate(
            x_hat=connect(x_hat, x_0) if self.reward_input == "x_0" else x_hat,  # Eq. 7
            weight=similarity_weight(distances, self.distance_floor, self.weighting),
            x_0=x_0,
            metrics=_metrics(steps, distances),
        )

    def _check_draws(self, steps: tuple[int, ...], num_steps: int) -> None:
        check_steps(steps, num_steps)
        if len(steps) != self.num_leaps or list(steps) != sorted(set(steps), reverse=True):
            raise UserError(f"LeapAlign: got steps {steps}, expected {self.num_leaps} different ones, noisiest first")


def _without_replacement(low: int, high: int, count: int, rng: torch.Generator) -> tuple[int, ...]:
    """Draw `count` different integers of {low..high}, every set equally likely, largest first."""
    import torch

    order = torch.randperm(high - low + 1, generator=rng, device=rng.device)
    return tuple(sorted((low + int(i) for i in order[:count]), reverse=True))


def _metrics(steps: tuple[int, ...], distances: list[Tensor]) -> dict[str, Tensor]:
    landings = ["j"] if len(steps) == 2 else [f"j{i}" for i in range(1, len(steps))]
    named_steps = {name: distances[0].new_full((), t) for name, t in zip(["k", *landings], steps)}
    return named_steps | {f"d_{name}": d for name, d in zip([*landings, "0"], distances)}


def _check_numbers(method: LeapAlign) -> None:
    low, high = method.timestep_range
    if not 0 <= method.nested_scale <= 1:
        raise UserError(f"LeapAlign: got nested_scale={method.nested_scale}, expected alpha in [0, 1]; the paper: 0.3")
    if not method.distance_floor > 0:
        raise UserError(f"LeapAlign: got distance_floor={method.distance_floor}, expected tau > 0; the paper uses 0.1")
    if not 0 <= low < high <= 1:
        raise UserError(f"LeapAlign: got timestep_range={low, high}, expected 0 <= low < high <= 1; (0, 1) is all")
    if not 0 <= method.leap_distance < 1:
        raise UserError(f"LeapAlign: got leap_distance={method.leap_distance}, expected [0, 1); 0 draws at random")


def _check_choices(method: LeapAlign) -> None:
    for name, choices in (("weighting", get_args(Weighting)), ("reward_input", get_args(RewardInput))):
        if getattr(method, name) not in choices:
            raise UserError(f"LeapAlign: got {name}={getattr(method, name)!r}, expected one of {', '.join(choices)}")
    if method.num_leaps > 1:
        return
    if method.weighting == "d_j":
        raise UserError("LeapAlign: one leap lands only on x_0 and has no d_j; use weighting d_0, both or none")
    if method.nested_only or method.leap_distance:
        raise UserError("LeapAlign: nested_only and leap_distance concern two leaps; use num_leaps=2 or leave them off")

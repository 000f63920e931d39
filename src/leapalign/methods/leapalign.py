"""LeapAlign (arXiv 2604.15311, Sec. 4, Algorithm 1): the reward's gradient through a few leaps along the rollout.

Claim: two leaps x_k -> x_j -> x_0 at random steps k > j train any step at constant memory, because the latent
connectors give the leaps the real rollout's values, and the discount keeps the nested gradient from exploding:

    dx_0/dtheta = -j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv(x_j)/dx dv(x_k)/dtheta    (Eq. 10)

Our choices, where the paper states none:
- n leaps: a connector at every landing, alpha at every input but the first, weight = 1 / sum of the floored distances.
- `timestep_range` and `leap_distance` are fractions of the T step indices, not of sigma: the paper draws k and j from
  the indices {1..T}, so the meaning does not depend on the grid's shift.
- `nested_only` with more than two leaps cuts the single-step term of the first leap alone.
- `pairs_per_rollout` M: M sets of steps on one rollout, which share the reward's gradient at x_0; each has its own
  weights by Eq. 12, and the M gradients are averaged. Its forwards run in the backward pass, on states that the rollout
  kept: T + 6 M forwards in all for two leaps (a backward counts as two), against (T + 4) M for M rollouts.
- `step_draws`: the paper leaves open which samples share (k, j); ours share one by default.
Departures: the hinge (text) instead of Algorithm 1's plain reward, see objective.py; rounding, see flow/leap.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from leapalign.errors import UserError
from leapalign.flow.leap import connect, per_sample
from leapalign.flow.rollout import Velocity, check_steps, grid_steps
from leapalign.methods.base import BySteps, Samples, Surrogate, check_positive, uniform_integer
from leapalign.methods.leaps import LeapTrajectory, leap_trajectory, replayed_leaps
from leapalign.methods.step_sets import as_tensor, stratified, without_replacement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weighting = Literal["both", "d_j", "d_0", "none"]
RewardInput = Literal["x_0", "x_hat"]
StepDraws = Literal["shared", "per-sample", "stratified"]


def similarity_weight(distances: list[Tensor], tau: float, weighting: Weighting) -> Tensor:
    """Return w_sim = 1 / (max(d_j, tau) + max(d_0, tau)) [B] (Eq. 12), or its ablations (Fig. 4d). Distances: [B]."""
    chosen = {"both": distances, "d_j": distances[:-1], "d_0": distances[-1:], "none": []}[weighting]
    if not chosen:
        return distances[-1].new_ones(distances[-1].shape)
    return 1 / sum(d.clamp(min=tau) for d in chosen)  # type: ignore[return-value]


class LeapDraws(NamedTuple):
    """The step indices that leap, noisiest first: (k, j) for two leaps."""

    steps: tuple[int, ...]


class LeapSets(NamedTuple):
    """Several sets of step indices: [M, n, B], or [M, n, 1] if the samples share them; noisiest first along n."""

    steps: Tensor


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

    pairs_per_rollout: int = 1  # M
    """Sets of steps (pairs k > j) that share a rollout and the reward's gradient; their gradients are averaged."""
    step_draws: StepDraws = "shared"
    """Steps drawn for all samples that share a draw, for each sample, or for each with all steps equally often."""

    def __post_init__(self) -> None:
        check_positive("LeapAlign", "num_leaps", self.num_leaps)
        check_positive("LeapAlign", "pairs_per_rollout", self.pairs_per_rollout)
        _check_numbers(self)
        _check_choices(self)

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> LeapDraws | LeapSets:
        """Draw n different step indices, uniform in the timestep range, or evenly spaced from a uniform lowest one.

        M sets, or sets for each sample, are independent, or stratified: in every round of as many sets as hold the
        steps of the range once, each step occurs once (up to n - 1 are left over at random).
        """
        first, last, spacing = self._range(num_steps)
        if self.step_draws == "shared":
            sets = [self._one_set(first, last, spacing, rng) for _ in range(self.pairs_per_rollout)]
            return LeapDraws(sets[0]) if len(sets) == 1 else LeapSets(as_tensor(sets)[:, :, None])
        count = self.pairs_per_rollout * (samples.sharing or samples.count)
        if self.step_draws == "stratified":
            sets = stratified(first, last, self.num_leaps, spacing, count, rng)
        else:
            sets = [self._one_set(first, last, spacing, rng) for _ in range(count)]
        steps = as_tensor(sets).unflatten(0, (-1, self.pairs_per_rollout))  # [samples, M, n]
        return LeapSets(steps[samples.rows].permute(1, 2, 0).contiguous())

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: LeapDraws | LeapSets) -> Surrogate:
        """Run T forwards, n with graph; LeapSets: T, and M n in the backward pass.

        Metrics: the steps k, j (j1, j2, ... for more leaps), d_j and d_0 [B]; for several sets their means.
        """
        if isinstance(draws, LeapSets):
            return self.surrogates(velocity, x, sigmas, [draws])[0]
        steps = draws.steps
        self._check_draws(steps, grid_steps(sigmas, x))
        found = leap_trajectory(velocity, x, sigmas, steps, self.nested_scale, self.nested_only)
        weight = similarity_weight(found.distances, self.distance_floor, self.weighting)
        indices = [weight.new_full((), t) for t in steps]
        return Surrogate(
            x_hat=connect(found.x_hat, found.x_0) if self.reward_input == "x_0" else found.x_hat,  # Eq. 7
            weight=weight,
            x_0=found.x_0,
            metrics=_metrics(indices, found.distances),
            by_steps=_by_steps([t.expand(1, len(x)) for t in indices], [weight], [found]),
        )

    def surrogates(
        self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Sequence[LeapDraws | LeapSets]
    ) -> list[Surrogate]:
        """Roll out once; return a surrogate for each of the draws, whose forwards run in its backward pass."""
        import torch

        sets = [d.steps if isinstance(d, LeapSets) else as_tensor([d.steps])[:, :, None] for d in draws]
        size, steps = len(sets[0]), torch.cat(sets).to(x.device)
        leaps = replayed_leaps(velocity, x, sigmas, steps, self.nested_scale, self.nested_only, share=1 / size)
        return [self._average(x, steps[i : i + size], leaps[i : i + size]) for i in range(0, len(steps), size)]

    def _average(self, x: Tensor, steps: Tensor, trajectories: list[LeapTrajectory]) -> Surrogate:
        """Average the M gradients, each with its own weights: x_hat carries sum_m w_m dx_hat_m / sum_m w_m."""
        import torch

        weights = [similarity_weight(t.distances, self.distance_floor, self.weighting) for t in trajectories]
        total = torch.stack(weights).sum(0)
        predictions = [per_sample(w / total, x) * t.x_hat for w, t in zip(weights, trajectories)]
        x_0, x_hat = trajectories[0].x_0, sum(predictions[1:], predictions[0])
        distances = [torch.stack(each).mean(0) for each in zip(*(t.distances for t in trajectories))]
        return Surrogate(
            x_hat=connect(x_hat, x_0) if self.reward_input == "x_0" else x_hat,
            weight=total / len(weights),
            x_0=x_0,
            metrics=_metrics(list(steps.to(x.dtype).mean((0, 2))), distances),
            by_steps=_by_steps([t.expand(-1, len(x)) for t in steps.unbind(1)], weights, trajectories),
        )

    def _range(self, num_steps: int) -> tuple[int, int, int]:
        """Return the first and the last step that may leap, and the spacing of leaps (1 if drawn at random)."""
        low, high = (floor(share * num_steps + 1e-9) for share in self.timestep_range)  # 0.29 * 100 is 28.999…
        spacing = max(1, round(self.leap_distance * num_steps)) if self.leap_distance else 1
        span = (self.num_leaps - 1) * spacing  # between the first leap and the last
        if high - low <= span:
            raise UserError(
                f"LeapAlign: {self.num_leaps} leaps need {span + 1} steps, but timestep_range {self.timestep_range} of "
                f"{num_steps} sampling steps holds {max(0, high - low)}; raise the number of sampling steps, widen "
                "timestep_range, or lower num_leaps or leap_distance"
            )
        return low + 1, high, spacing

    def _one_set(self, first: int, last: int, spacing: int, rng: torch.Generator) -> tuple[int, ...]:
        if not self.leap_distance:
            return without_replacement(first, last, self.num_leaps, rng)
        lowest = uniform_integer(first, last - (self.num_leaps - 1) * spacing, rng)
        return tuple(lowest + i * spacing for i in reversed(range(self.num_leaps)))

    def _check_draws(self, steps: tuple[int, ...], num_steps: int) -> None:
        check_steps(steps, num_steps)
        if len(steps) != self.num_leaps or list(steps) != sorted(set(steps), reverse=True):
            raise UserError(f"LeapAlign: got steps {steps}, expected {self.num_leaps} different ones, noisiest first")


def step_names(num_leaps: int) -> list[str]:
    """Name the leaps' steps, noisiest first: k, j; with more leaps k, j1, j2, ...; with one leap k."""
    return ["k", "j"] if num_leaps == 2 else ["k", *(f"j{i}" for i in range(1, num_leaps))]


def _metrics(steps: list[Tensor], distances: list[Tensor]) -> dict[str, Tensor]:
    """Name the steps (0-dim each) and the distances [B]."""
    names = step_names(len(steps))
    return dict(zip(names, steps)) | {f"d_{name}": d for name, d in zip([*names[1:], "0"], distances)}


def _by_steps(steps: list[Tensor], weights: list[Tensor], trajectories: list[LeapTrajectory]) -> BySteps:
    """Name the steps ([M, B] each), distances, weights and gradients of M trajectories."""
    import torch

    names, sets = step_names(len(steps)), len(trajectories)
    distances = [torch.stack(each) for each in zip(*(t.distances for t in trajectories))]
    measured = [t.gradients for t in trajectories]

    def gradients() -> dict[str, Tensor]:  # averaging divides each set's by M
        single = {name: [each.single[i] for each in measured] for i, name in enumerate(names)}
        nested = {name: [each.nested[i] for each in measured] for i, name in enumerate(names[:-1])}
        named = {f"grad_single/{n}": g for n, g in single.items()} | {f"grad_nested/{n}": g for n, g in nested.items()}
        return {name: sets * torch.stack(norms) for name, norms in named.items()}

    values = {"weight": torch.stack(weights)} | {f"d_{name}": d for name, d in zip([*names[1:], "0"], distances)}
    return BySteps(steps=dict(zip(names, steps)), values=values, gradients=gradients)


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
    allowed = {"weighting": Weighting, "reward_input": RewardInput, "step_draws": StepDraws}
    for name, choices in ((name, get_args(words)) for name, words in allowed.items()):
        if getattr(method, name) not in choices:
            raise UserError(f"LeapAlign: got {name}={getattr(method, name)!r}, expected one of {', '.join(choices)}")
    if method.pairs_per_rollout > 1 and method.reward_input == "x_hat":
        raise UserError("LeapAlign: several pairs share the reward of x_0, which they need; use reward_input=x_0")
    if method.num_leaps > 1:
        return
    if method.weighting == "d_j":
        raise UserError("LeapAlign: one leap lands only on x_0 and has no d_j; use weighting d_0, both or none")
    if method.nested_only or method.leap_distance:
        raise UserError("LeapAlign: nested_only and leap_distance concern two leaps; use num_leaps=2 or leave them off")

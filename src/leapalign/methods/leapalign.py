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

from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from leapalign.errors import UserError
from leapalign.flow.leap import connect, discount, leap, mean_distance, per_sample
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import Samples, Surrogate, check_positive, uniform_integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weighting = Literal["both", "d_j", "d_0", "none"]
RewardInput = Literal["x_0", "x_hat"]
StepDraws = Literal["shared", "per-sample", "stratified"]


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


def replayed_leaps(
    velocity: Velocity, x: Tensor, sigmas: Tensor, steps: Tensor, alpha: float, nested_only: bool = False
) -> list[LeapTrajectory]:
    """Roll out `x` = x_T in T forwards without graph; then join leaps at the kept states, for M sets of steps.

    `steps` [M, n, B], or [M, n, 1] if all samples leap at the same ones; noisiest first. Values and gradients are those
    of `leap_trajectory`, but a differentiated forward runs in the backward pass (`leapalign.flow.graph.recomputed`).
    """
    from leapalign.flow.graph import recomputed

    x_0, states, velocities = _kept_states(velocity, x, sigmas, steps)
    starts = sigmas[steps]  # [M, n, B]
    ends = sigmas.new_zeros(starts.shape)
    ends[:, :-1] = starts[:, 1:]
    trajectories = []
    for m in range(len(steps)):
        x_hat, distances = states[m, 0], []
        for i, (state, v, start, end) in enumerate(zip(states[m], velocities[m], starts[m], ends[m])):
            start, end = (time.squeeze() if len(time) == 1 else time for time in (start, end))  # 0-dim if shared
            x_t = connect(x_hat, state) if i else state
            v = recomputed(velocity, discount(x_t, alpha) if i else x_t, start, v, share=1 / len(steps))
            x_hat = leap(x_t.detach() if nested_only and i == 1 else x_t, v, start, end)
            distances.append(mean_distance(states[m, i + 1] if i + 1 < len(states[m]) else x_0, x_hat))
        trajectories.append(LeapTrajectory(x_0, x_hat, distances))
    return trajectories


def _kept_states(velocity: Velocity, x: Tensor, sigmas: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roll out without graph; return x_0 [B, ...], and states and velocities [M, n, B, ...] at the samples' steps."""
    import torch

    kept = x.new_zeros(*steps.shape[:2], *x.shape)
    states, velocities = kept, kept
    for t in range(grid_steps(sigmas, x), 0, -1):
        v = without_graph(velocity, x, sigmas[t])
        here = (steps == t).view(*steps.shape, *[1] * (x.ndim - 1))  # without indexing, for which a GPU would wait
        states, velocities = torch.where(here, x, states), torch.where(here, v.to(x.dtype), velocities)
        x = euler_step(x, v, sigmas[t], sigmas[t - 1])
    return x, states, velocities


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
            return LeapDraws(sets[0]) if len(sets) == 1 else LeapSets(_tensor(sets)[:, :, None])
        count = self.pairs_per_rollout * (samples.sharing or samples.count)
        if self.step_draws == "stratified":
            sets = _stratified(first, last, self.num_leaps, spacing, count, rng)
        else:
            sets = [self._one_set(first, last, spacing, rng) for _ in range(count)]
        steps = _tensor(sets).unflatten(0, (-1, self.pairs_per_rollout))  # [samples, M, n]
        return LeapSets(steps[samples.rows].permute(1, 2, 0).contiguous())

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: LeapDraws | LeapSets) -> Surrogate:
        """Run T forwards, n with graph; LeapSets: T, and M n in the backward pass.

        Metrics: the steps k, j (j1, j2, ... for more leaps), d_j and d_0 [B]; for several sets their means.
        """
        if isinstance(draws, LeapSets):
            return self._of_sets(velocity, x, sigmas, draws.steps.to(x.device))
        steps = draws.steps
        self._check_draws(steps, grid_steps(sigmas, x))
        x_0, x_hat, distances = leap_trajectory(velocity, x, sigmas, steps, self.nested_scale, self.nested_only)
        return Surrogate(
            x_hat=connect(x_hat, x_0) if self.reward_input == "x_0" else x_hat,  # Eq. 7
            weight=similarity_weight(distances, self.distance_floor, self.weighting),
            x_0=x_0,
            metrics=_metrics([distances[0].new_full((), t) for t in steps], distances),
        )

    def _of_sets(self, velocity: Velocity, x: Tensor, sigmas: Tensor, steps: Tensor) -> Surrogate:
        """Average the M gradients, each with its own weights: x_hat carries sum_m w_m dx_hat_m / sum_m w_m."""
        import torch

        trajectories = replayed_leaps(velocity, x, sigmas, steps, self.nested_scale, self.nested_only)
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
            return _without_replacement(first, last, self.num_leaps, rng)
        lowest = uniform_integer(first, last - (self.num_leaps - 1) * spacing, rng)
        return tuple(lowest + i * spacing for i in reversed(range(self.num_leaps)))

    def _check_draws(self, steps: tuple[int, ...], num_steps: int) -> None:
        check_steps(steps, num_steps)
        if len(steps) != self.num_leaps or list(steps) != sorted(set(steps), reverse=True):
            raise UserError(f"LeapAlign: got steps {steps}, expected {self.num_leaps} different ones, noisiest first")


def _without_replacement(low: int, high: int, count: int, rng: torch.Generator) -> tuple[int, ...]:
    """Draw `count` different integers of {low..high}, every set equally likely, largest first."""
    import torch

    order = torch.randperm(high - low + 1, generator=rng, device=rng.device)
    return tuple(sorted((low + int(i) for i in order[:count]), reverse=True))


def _stratified(
    first: int, last: int, leaps: int, spacing: int, count: int, rng: torch.Generator
) -> list[tuple[int, ...]]:
    """Draw `count` sets so that the steps first..last occur equally often; see `LeapAlign.draw`."""
    import torch

    sets: list[tuple[int, ...]] = []
    while len(sets) < count:
        if spacing == 1:
            order = torch.randperm(last - first + 1, generator=rng, device=rng.device).tolist()
            chunks = [order[i : i + leaps] for i in range(0, len(order) - leaps + 1, leaps)]
            sets += [tuple(sorted((first + i for i in chunk), reverse=True)) for chunk in chunks]
        else:
            starts = torch.randperm(last - first + 1 - (leaps - 1) * spacing, generator=rng, device=rng.device)
            sets += [tuple(first + s + i * spacing for i in reversed(range(leaps))) for s in starts.tolist()]
    return sets[:count]


def _tensor(sets: list[tuple[int, ...]]) -> Tensor:
    import torch

    return torch.tensor(sets)


def _metrics(steps: list[Tensor], distances: list[Tensor]) -> dict[str, Tensor]:
    """Name the steps (0-dim each) and the distances [B]."""
    landings = ["j"] if len(steps) == 2 else [f"j{i}" for i in range(1, len(steps))]
    named_steps = dict(zip(["k", *landings], steps))
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

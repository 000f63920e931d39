"""The paper's ablations (Fig. 4 and 6, Table 5) as studies: LeapAlign against itself with one switch moved.

They have the arena's run: 120 updates of 16 samples, two draws an update, clipping by quantile, no anchor. Weights by
distance differ little where a leap lands near the real state, so their ablation is repeated at guidance 4 with a lower
floor tau: there the flow is more curved and the floor hides less of the distances.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from leapalign.methods.leapalign import LeapAlign
from leapalign.run import Run
from leapalign.studies.arena.named import arena, contender
from leapalign.studies.arena.study import Contender, Study

SEEDS = (0, 1, 2)
GUIDANCE, FLOOR = 4.0, 0.02


def ablations() -> Study:
    """Eighteen variants, three seeds, equal updates."""
    methods = {
        "leapalign": LeapAlign(),
        "alpha-0": LeapAlign(nested_scale=0.0),
        "alpha-1": LeapAlign(nested_scale=1.0),
        "leaps-1": LeapAlign(num_leaps=1),
        "leaps-3": LeapAlign(num_leaps=3),
        **_weighted(LeapAlign()),
        "late-half": LeapAlign(timestep_range=(0.0, 0.5)),
        "fixed-distance": LeapAlign(leap_distance=0.5),
        **{f"nested-only-{alpha:g}": LeapAlign(nested_only=True, nested_scale=alpha) for alpha in (0.0, 0.3, 1.0)},
    }
    contenders = [contender(name, method) for name, method in methods.items()]
    contenders += [_threshold(contenders[0].run, value) for value in (0.5, 0.8, 0.95)]  # the arena's own is 0.65
    return replace(
        arena(),
        name="ablations",
        out="runs/ablations",
        contenders=tuple(replace(each, grid=()) for each in contenders),
        seeds=SEEDS,
        varied=("rewards",),
        equal_compute=False,
    )


def ablations_guided() -> Study:
    """The weights by distance and the reward's input at guidance 4 and tau 0.02."""
    method = LeapAlign(distance_floor=FLOOR)
    methods = {"leapalign": method, **_weighted(method)}
    runs = {name: contender(name, method).run for name, method in methods.items()}
    guided = {name: _guided(run) for name, run in runs.items()}
    return replace(
        ablations(),
        name="ablations-guided",
        out="runs/ablations-guided",
        contenders=tuple(Contender(name=name, run=run) for name, run in guided.items()),
        varied=(),
    )


def _weighted(method: LeapAlign) -> dict[str, LeapAlign]:
    """Name variants of the weight and of the image that the reward sees (Fig. 4c, 4d)."""
    return {
        "weight-d_j": replace(method, weighting="d_j"),
        "weight-d_0": replace(method, weighting="d_0"),
        "weight-none": replace(method, weighting="none"),
        "x_hat": replace(method, reward_input="x_hat", weighting="d_j"),
        "x_hat-both": replace(method, reward_input="x_hat"),
    }


def _guided(run: Run) -> Run:
    model: Any = run.model
    return replace(run, model=replace(model, guidance_scale=GUIDANCE))


def _threshold(run: Run, value: float) -> Contender:
    (term,) = run.rewards
    return Contender(name=f"lambda-{value:g}", run=replace(run, rewards=(replace(term, threshold=value),)))

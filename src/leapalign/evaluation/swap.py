"""The swap test: which sampling steps decide what an image shows. No training.

An image is sampled with one prompt A down to step t, and with another prompt B in the steps t..1. If it shows what B
says, the steps before t had not decided it; if it still shows A, the steps from t on cannot change it. t = T is B alone
and t = 0 is A alone. Measured are, on the same noise,

- GenEval's verdict under B and under A, per task, where a detector can judge (ShapeWorld);
- with the margin m(x) = r(x, B) - r(x, A) of a reward, the share (m(t) - m(A alone)) / (m(B alone) - m(A alone)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from leapalign.evaluation.evaluate import Detector, Scorers, score
from leapalign.evaluation.image_folder import ImageFiles
from leapalign.evaluation.sampling import Sampling
from leapalign.evaluation.scheduled import chosen_steps, draw_schedules
from leapalign.evaluation.statistics import overall, summary
from leapalign.flow.rollout import Velocity
from leapalign.flow.schedules import within
from leapalign.prompts import Prompt

if TYPE_CHECKING:
    from leapalign.models.base import Model

Pair = tuple[Prompt, Prompt]  # A, which begins, and B, which is swapped in


@dataclass(frozen=True, kw_only=True, eq=False)
class Swapped:
    """The measured swaps, noisiest first, from T (B alone) to 0 (A alone)."""

    steps: tuple[int, ...]
    images: tuple[ImageFiles, ...]  # of each step
    numbers: dict[str, Any]  # JSON values


def swap_test(
    model: Model,
    pairs: Sequence[Pair],
    *,
    sampling: Sampling,
    rewards: Scorers,
    detector: Detector | None,
    at: Sequence[int] = (),
    on_batch: Callable[[int], None] | None = None,
) -> Swapped:
    """Sample with every pair, B swapped in at the steps `at` (empty: about ten of them), and measure what shows.

    0 and T are always measured. `detector` needs metadata of both prompts. Raises UserError for a step outside 0..T.
    """
    num_steps = sampling.num_steps
    steps = sorted({num_steps, 0, *chosen_steps(at, 0, num_steps)}, reverse=True)
    model.prepare(list(dict.fromkeys(prompt.text for pair in pairs for prompt in pair)))

    def velocities(rows: Sequence[int]) -> list[Velocity]:
        return [model.velocity(model.encode([pairs[row][side].text for row in rows])) for side in (0, 1)]

    schedules = [within(1, t, num_steps) for t in steps]
    images = draw_schedules(model, [b for _, b in pairs], velocities, schedules, sampling, on_batch)
    measured = [_measure(each, pairs, sampling, rewards, detector) for each in images]
    sigmas = model.sigmas(num_steps).tolist()
    table = [
        {"step": t, "sigma": round(sigmas[t], 4)} | _numbers(found, measured[-1], measured[0])
        for t, found in zip(steps, measured)
    ]
    numbers = {"num_steps": num_steps, "images": len(images[0]), "steps": table, "half": _half(table)}
    return Swapped(steps=tuple(steps), images=tuple(images), numbers=numbers)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """What the images of one step show."""

    tags: list[str]  # tasks of the prompts B
    obeys: dict[str, list[bool]]  # "second" (B) and "first" (A); empty without a detector
    margins: dict[str, Tensor]  # reward -> [N]: under B, less under A


def _measure(
    images: ImageFiles, pairs: Sequence[Pair], sampling: Sampling, rewards: Scorers, detector: Detector | None
) -> _Measured:
    first, second = (
        score(
            images,
            [pair[side] for pair in pairs for _ in range(sampling.images_per_prompt)],
            rewards=rewards,
            detector=detector,
            batch_size=sampling.batch_size,
        )
        for side in (0, 1)
    )
    return _Measured(
        tags=second.tags,
        obeys={"second": second.correct, "first": first.correct} if detector else {},
        margins={name: second.rewards[name] - first.rewards[name] for name in rewards},
    )


def _numbers(found: _Measured, a_alone: _Measured, b_alone: _Measured) -> dict[str, Any]:
    """Return {"geneval": {"overall" or task: {"second", "first"}}, "rewards": {name: {"share", "standard_error"}}}."""
    result: dict[str, Any] = {}
    if found.obeys:
        tables = {side: summary(found.tags, correct) for side, correct in found.obeys.items()}
        tables = {side: {"overall": overall(tasks)} | tasks for side, tasks in tables.items()}
        tasks = tables["second"]
        result["geneval"] = {task: {side: asdict(tables[side][task]) for side in tables} for task in tasks}
    names = found.margins
    result["rewards"] = {n: share(names[n], a_alone.margins[n], b_alone.margins[n]) for n in names}
    return result


def share(values: Tensor, start: Tensor, end: Tensor) -> dict[str, float | None]:
    """Return mean(values - start) / mean(end - start) over images that have all three, with its standard error.

    The error is that of a ratio of means, to first order. None if end is not above start by two standard errors: the
    ratio would mean nothing.
    """
    kept = values.isfinite() & start.isfinite() & end.isfinite()
    part, whole = ((v[kept] - start[kept]).double().numpy() for v in (values, end))
    if len(whole) < 2 or whole.mean() <= 2 * whole.std(ddof=1) / np.sqrt(len(whole)):
        return {"share": None, "standard_error": None}
    ratio = part.mean() / whole.mean()
    error = (part - ratio * whole).std(ddof=1) / np.sqrt(len(whole)) / whole.mean()
    return {"share": float(ratio), "standard_error": float(error)}


def _half(table: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Return, for each measure, the last step at which a swap still has at least half of its whole effect."""
    curves: dict[str, list[float | None]] = {}
    for task in table[0].get("geneval", {}):
        curves[task] = [row["geneval"][task]["second"]["accuracy"] for row in table]
    curves |= {f"reward {name}": [row["rewards"][name]["share"] for row in table] for name in table[0]["rewards"]}
    return {name: last_with_half([row["step"] for row in table], values) for name, values in curves.items()}


def last_with_half(steps: Sequence[int], values: Sequence[float | None]) -> int | None:
    """Return the last step whose value has at least half of the way from the last value (A alone) to the first (B).

    None if a value is missing, or if B alone is not above A alone.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values) or known[0] <= known[-1]:
        return None
    return min(step for step, value in zip(steps, known) if value >= (known[0] + known[-1]) / 2)

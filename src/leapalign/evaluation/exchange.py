"""Tuned and base weights exchanged by sampling step: in which steps a run's gain sits. No training.

Images are sampled with the tuned weights in a range of steps and the base's elsewhere, and the other way round, on the
same prompts and noise as base and tuned model alone. Weights are shared over time, so training that reaches only some
steps may move others too: the exchange tells where the gain acts, not where the gradient came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leapalign.evaluation.evaluate import Detector, Scorers, score
from leapalign.evaluation.image_folder import ImageFiles
from leapalign.evaluation.sampling import Sampling
from leapalign.evaluation.scheduled import chosen_steps, draw_schedules
from leapalign.evaluation.statistics import compare
from leapalign.flow.rollout import Velocity
from leapalign.flow.schedules import Schedule, within
from leapalign.prompts import Prompt

if TYPE_CHECKING:
    from leapalign.models.base import Model

Range = tuple[int, int]  # first and last step, both included; 1 is the last before the image


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Base and tuned model. An adapter is one model, which is the base in the context `as_base`."""

    base: Model
    tuned: Model
    as_base: Callable[[], AbstractContextManager[None]] = nullcontext

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts; text encoders are freed."""
        self.tuned.prepare(prompts)
        if self.base is not self.tuned:
            self.base.prepare(prompts)

    def velocities(self, prompts: Sequence[str]) -> tuple[Velocity, Velocity]:
        """Return the velocities of base and tuned model."""
        base = self.base.velocity(self.base.encode(prompts))

        def without_tuning(x: Tensor, sigma: Tensor) -> Tensor:
            with self.as_base():
                return base(x, sigma)

        return without_tuning, self.tuned.velocity(self.tuned.encode(prompts))


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchanged:
    """Names of the variants (base, tuned, and the ranges with tuned weights), their images, and the numbers."""

    names: tuple[str, ...]
    images: tuple[ImageFiles, ...]
    numbers: dict[str, Any]  # JSON values


def exchange_by_step(
    ends: Ends,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    rewards: Scorers,
    detector: Detector | None,
    ranges: Sequence[Range] = (),
    on_batch: Callable[[int], None] | None = None,
) -> Exchanged:
    """Evaluate tuned weights in each range of steps alone, and in all others alone, against the base.

    `ranges` empty: steps 1..s for every s (about ten of them), which splits the steps in two. Raises UserError for a
    range outside 1..T.
    """
    num_steps, texts = sampling.num_steps, [prompt.text for prompt in prompts]
    ranges = list(ranges) or [(1, s) for s in (chosen_steps((), 1, num_steps - 1) if num_steps > 1 else ())]
    inside = [within(first, last, num_steps) for first, last in ranges]
    schedules = list(dict.fromkeys([within(1, 0, num_steps), within(1, num_steps, num_steps), *inside]))
    schedules = list(dict.fromkeys([*schedules, *map(_other, inside)]))
    ends.prepare(list(dict.fromkeys(texts)))

    def velocities(rows: Sequence[int]) -> tuple[Velocity, Velocity]:
        return ends.velocities([texts[row] for row in rows])

    images = draw_schedules(ends.tuned, prompts, velocities, schedules, sampling, on_batch)
    each = [prompt for prompt in prompts for _ in range(sampling.images_per_prompt)]
    judged = [score(i, each, rewards=rewards, detector=detector, batch_size=sampling.batch_size) for i in images]
    found = dict(zip(schedules, (compare(judged[0], other) for other in judged)))
    table = [
        {"steps": f"{first}-{last}", "only_there": found[here], "everywhere_else": found[_other(here)]}
        for (first, last), here in zip(ranges, inside)
    ]
    numbers = {"num_steps": num_steps, "images": len(each), "tuned": found[schedules[1]], "ranges": table}
    return Exchanged(names=tuple(map(_name, schedules)), images=tuple(images), numbers=numbers)


def _other(schedule: Schedule) -> Schedule:
    return tuple(1 - index for index in schedule)


def _name(schedule: Schedule) -> str:
    """Name a schedule by its tuned steps: base, tuned, 5-8, or 1-2 5-8."""
    num_steps = len(schedule)
    tuned = [num_steps - place for place, index in enumerate(schedule) if index][::-1]
    if len(tuned) in (0, num_steps):
        return "tuned" if tuned else "base"
    firsts = [t for t in tuned if t - 1 not in tuned]
    lasts = [t for t in tuned if t + 1 not in tuned]
    return " ".join(f"{first}-{last}" for first, last in zip(firsts, lasts))

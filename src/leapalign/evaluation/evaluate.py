"""What a model's pictures are worth: GenEval's six tasks by a detector, and rewards, with their standard errors.

Two models are compared over the same prompts and noises; the standard error of their difference is the paired one.
Errors are over pictures. Prompts and training seeds vary too: for those, repeat with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leapalign.errors import RunStopped, UserError
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.geneval.rules import Detection, Verdict, judge, overall, paired_difference, summary
from leapalign.prompts import Prompt

if TYPE_CHECKING:
    from leapalign.models.base import Model

Detector = Callable[[Tensor], Sequence[Sequence[Detection]]]
Scorers = Mapping[str, Callable[[Tensor, Sequence[str]], Tensor]]  # name -> reward(images, texts) [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """N pictures and what was found of each; without a detector `detections` and `verdicts` are empty."""

    prompts: tuple[Prompt, ...]  # N, repeated where a prompt has several pictures
    images: Tensor  # [N, 3, H, W] in [0, 1]
    detections: tuple[Sequence[Detection], ...]
    verdicts: tuple[Verdict, ...]
    rewards: dict[str, Tensor]  # name -> [N] float32

    @property
    def tags(self) -> list[str]:
        return [(prompt.metadata or {}).get("tag", "") for prompt in self.prompts]

    @property
    def correct(self) -> list[bool]:
        return [verdict.correct for verdict in self.verdicts]


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    rewards: Scorers,
    detector: Detector | None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Draw pictures for all prompts with the model's present weights and score them; `detector` needs metadata."""
    images = draw_images(model, [prompt.text for prompt in prompts], sampling, on_batch)
    each = [prompt for prompt in prompts for _ in range(sampling.images_per_prompt)]
    return score(images, each, rewards=rewards, detector=detector, batch_size=sampling.batch_size)


@torch.no_grad()
def score(
    images: Tensor, prompts: Sequence[Prompt], *, rewards: Scorers, detector: Detector | None, batch_size: int = 64
) -> Evaluation:
    """Judge pictures [N, 3, H, W] of N prompts."""
    detections, verdicts = (), ()
    if detector:
        detections = tuple(detector(images))
        verdicts = tuple(judge(_metadata(prompt), found) for prompt, found in zip(prompts, detections))
    texts = [prompt.text for prompt in prompts]
    parts = [slice(start, start + batch_size) for start in range(0, len(texts), batch_size)]
    values = {name: torch.cat([r(images[p], texts[p]).float().cpu() for p in parts]) for name, r in rewards.items()}
    for name, reward in rewards.items():
        _check(name, reward, values[name], texts)
    return Evaluation(prompts=tuple(prompts), images=images, detections=detections, verdicts=verdicts, rewards=values)


def _check(name: str, reward: Any, values: Tensor, texts: list[str]) -> None:
    """A reward that answers in words counts its answers without a number (`failures`); of any other NaN is an error."""
    missing = (~values.isfinite()).nonzero().flatten().tolist()
    if missing and not hasattr(reward, "failures"):
        raise RunStopped(f"the reward {name}: {values[missing[0]]} for the prompt {texts[missing[0]]!r}")
    if len(missing) == len(values):
        raise UserError(
            f"the reward {name} gave no readable number for any of {len(values)} pictures; are its weights right?"
        )


def _metadata(prompt: Prompt) -> dict[str, Any]:
    if not prompt.metadata or "tag" not in prompt.metadata:
        raise UserError(
            f"prompt {prompt.text!r} has no GenEval metadata; give prompts from a .jsonl with tag and include"
        )
    return prompt.metadata


def report(evaluation: Evaluation) -> dict[str, Any]:
    """JSON values: the six-task table with `overall`, and each reward's mean; all with standard errors."""
    result: dict[str, Any] = {"images": len(evaluation.prompts)}
    if evaluation.verdicts:
        tasks = summary(evaluation.tags, evaluation.correct)
        result["geneval"] = {"overall": asdict(overall(tasks))} | {tag: asdict(task) for tag, task in tasks.items()}
    result["rewards"] = {name: _mean(values) for name, values in evaluation.rewards.items()}
    return result


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """JSON values: before, after, their difference and its paired standard error, for each task and reward."""
    if [p.text for p in before.prompts] != [p.text for p in after.prompts]:
        raise ValueError("compare: the two evaluations have other prompts; use the same prompts and sampling for both")
    one, two = report(before), report(after)
    result: dict[str, Any] = {"images": one["images"]}
    if before.verdicts and after.verdicts:
        changes = paired_difference(before.tags, before.correct, after.correct)
        tasks = {tag: (one["geneval"][tag], two["geneval"][tag]) for tag in one["geneval"]}
        result["geneval"] = {tag: _pair(b, a, "accuracy", changes[tag]) for tag, (b, a) in tasks.items()}
    result["rewards"] = {
        name: _pair(b, two["rewards"][name], "mean", _change(after.rewards[name] - before.rewards[name]))
        for name, b in one["rewards"].items()
    }
    return result


def _pair(before: dict[str, Any], after: dict[str, Any], key: str, change: tuple[float, float]) -> dict[str, Any]:
    return {
        "before": before[key],
        "before_standard_error": before["standard_error"],
        "after": after[key],
        "after_standard_error": after["standard_error"],
        "difference": change[0],
        "difference_standard_error": change[1],
        "num": before["num"],
    }


def _mean(values: Tensor) -> dict[str, Any]:
    """Over the numbers there are; `failures` counts the pictures without one."""
    mean, error = _change(values)
    return {"mean": mean, "standard_error": error, "num": len(values), "failures": int(values.isnan().sum())}


def _change(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over what is not NaN; of one value there is none (0)."""
    array = values[~values.isnan()].double().numpy()
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0

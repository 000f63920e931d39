"""Accuracies of GenEval's tasks, means of rewards and their paired differences, all with standard errors.

Two models are compared on the same prompts and noise; the standard error of their difference is the paired one. Errors
describe variation over images only; to include prompts and training seeds, repeat with other seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from leapalign.geneval.open_colors import entropy, open_colors
from leapalign.geneval.rules import Detection, Verdict
from leapalign.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

EVALUATION_FILE = "evaluation.json"  # what `report` or `compare` returned, in the folder of the images


class Images(Protocol):
    """N images, in memory (a tensor [N, 3, H, W]) or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """[3, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Results for N images; without a detector `detections` and `verdicts` are empty."""

    prompts: tuple[Prompt, ...]  # N, repeated if a prompt has several images
    images: Images  # N
    detections: tuple[Sequence[Detection], ...]
    verdicts: tuple[Verdict, ...]
    rewards: dict[str, Tensor]  # name -> [N] float32
    statistics: dict[str, Tensor] = field(default_factory=dict)  # name -> [N], of image_statistics.py
    diversity: dict[str, Tensor] = field(default_factory=dict)  # feature space -> [P], of diversity.py

    @property
    def tags(self) -> list[str]:
        return [(prompt.metadata or {}).get("tag", "") for prompt in self.prompts]

    @property
    def open_colors(self) -> Counter[str]:
        """Colours of all detected objects whose prompt names none."""
        return open_colors([prompt.metadata or {} for prompt in self.prompts], self.detections)

    @property
    def correct(self) -> list[bool]:
        return [verdict.correct for verdict in self.verdicts]


@dataclass(frozen=True)
class Accuracy:
    """Fraction of images that are correct, with its standard error; or the unweighted mean of several tasks."""

    accuracy: float
    standard_error: float
    correct: int
    num: int


def summary(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, Accuracy]:
    """Accuracy of each task over images, in the order of their first appearance."""
    tasks = {}
    for tag in dict.fromkeys(tags):
        hits = [float(c) for t, c in zip(tags, correct) if t == tag]
        p = sum(hits) / len(hits)
        tasks[tag] = Accuracy(p, float(np.sqrt(p * (1 - p) / len(hits))), int(sum(hits)), len(hits))
    return tasks


def overall(tasks: dict[str, Accuracy]) -> Accuracy:
    """The unweighted mean of the tasks' accuracies: GenEval's headline number."""
    each = list(tasks.values())
    error = float(np.sqrt(sum(t.standard_error**2 for t in each)) / len(each))
    return Accuracy(
        sum(t.accuracy for t in each) / len(each), error, sum(t.correct for t in each), sum(t.num for t in each)
    )


def paired_difference(
    tags: Sequence[str], before: Sequence[bool], after: Sequence[bool]
) -> dict[str, tuple[float, float]]:
    """For each task and "overall": mean of after - before on the same prompts and noise, and its standard error."""
    result = {}
    for tag in dict.fromkeys(tags):
        change = np.asarray([float(a) - float(b) for t, b, a in zip(tags, before, after) if t == tag])
        error = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0.0
        result[tag] = (float(change.mean()), float(error))
    means, errors = np.asarray(list(result.values())).T
    result["overall"] = (float(means.mean()), float(np.sqrt((errors**2).sum()) / len(errors)))
    return result


def report(evaluation: Evaluation) -> dict[str, Any]:
    """The six-task table with `overall`, and means of rewards, image statistics and diversity; JSON values.

    `open_colors` has the entropy in bits and the counts, if any object of a detector has an open colour.
    """
    result: dict[str, Any] = {"images": len(evaluation.prompts)}
    if evaluation.verdicts:
        tasks = summary(evaluation.tags, evaluation.correct)
        result["geneval"] = {"overall": asdict(overall(tasks))} | {tag: asdict(task) for tag, task in tasks.items()}
    if counts := evaluation.open_colors:
        result["open_colors"] = {"entropy": entropy(counts), "counts": dict(counts.most_common())}
    for key, measured in _MEASURED.items():
        result[key] = {name: _mean(values) for name, values in measured(evaluation).items()}
    return result


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Before, after, their difference and its paired standard error for each task and measure; JSON values.

    `open_colors` and `diversity` have `ratio`, after over before (null if before is 0).
    """
    if [p.text for p in before.prompts] != [p.text for p in after.prompts]:
        raise ValueError("compare: the two evaluations have other prompts; use the same prompts and sampling for both")
    one, two = report(before), report(after)
    result: dict[str, Any] = {"images": one["images"]}
    if before.verdicts and after.verdicts:
        changes = paired_difference(before.tags, before.correct, after.correct)
        tasks = {tag: (one["geneval"][tag], two["geneval"][tag]) for tag in one["geneval"]}
        result["geneval"] = {tag: _pair(b, a, "accuracy", changes[tag]) for tag, (b, a) in tasks.items()}
    if "open_colors" in one or "open_colors" in two:
        result["open_colors"] = _compare_colors(before.open_colors, after.open_colors)
    for key, measured in _MEASURED.items():
        values = measured(after)
        result[key] = {name: _compare_means(old, values[name]) for name, old in measured(before).items()}
    for row in result["diversity"].values():
        row["ratio"] = _ratio(row["before"], row["after"])
    return result


_MEASURED: Mapping[str, Callable[[Evaluation], dict[str, Tensor]]] = {
    "rewards": lambda evaluation: evaluation.rewards,
    "diversity": lambda evaluation: evaluation.diversity,
    "image_statistics": lambda evaluation: evaluation.statistics,
}


def _compare_means(before: Tensor, after: Tensor) -> dict[str, Any]:
    return _pair(_mean(before), _mean(after), "mean", mean_and_error(after - before))


def _compare_colors(before: Counter[str], after: Counter[str]) -> dict[str, Any]:
    one, two = entropy(before), entropy(after)
    colors = {color: {"before": before[color], "after": after[color]} for color, _ in (before + after).most_common()}
    entropies = {"before": one, "after": two, "difference": two - one, "ratio": _ratio(one, two)}
    return {"entropy": entropies, "counts": colors}


def _ratio(before: float, after: float) -> float | None:
    return after / before if before else None


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
    """Mean over images that have a number; `failures` counts the others."""
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error, "num": len(values), "failures": int(values.isnan().sum())}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of the values that are not NaN, and its standard error (0 for a single value)."""
    array = values[~values.isnan()].double().numpy()
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0

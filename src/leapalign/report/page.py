"""report.html: one self-contained page about a run: numbers with errors, curves, tables, images, configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.prompts.base import spread
from leapalign.report.figures import Curve, curve_svg
from leapalign.report.pictures import data_uri
from leapalign.report.tables import TASK_NAMES

if TYPE_CHECKING:
    from leapalign.evaluation.statistics import Evaluation

METRIC_NAMES = {
    "reward": "Reward of the training batch",
    "loss": "Loss",
    "grad_norm": "Gradient norm, before clipping",
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Images of one prompt before and after, from the same noise. Verdicts are "" without a detector."""

    prompt: str
    before: str  # data URI
    after: str
    before_right: bool | None
    after_right: bool | None
    before_verdict: str
    after_verdict: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """Content of the page. `comparison` is the result of `evaluation.statistics.compare`."""

    title: str
    run: dict[str, Any]  # run.json
    metrics: Sequence[dict[str, Any]]  # metrics.jsonl
    comparison: dict[str, Any]
    rewards: dict[str, str]  # names in the comparison -> words for the page
    pairs: dict[str, list[Pair]]  # task -> images
    commands: Sequence[str]
    facts: dict[str, str]  # machine, versions, times


def pairs_of(before: Evaluation, after: Evaluation, per_task: int) -> dict[str, list[Pair]]:
    """Select images of each task at even distances through its distinct prompts, independent of results."""
    groups: dict[str, list[Pair]] = {}
    for tag in dict.fromkeys(before.tags):
        rows = {before.prompts[row].text: row for row, t in reversed(list(enumerate(before.tags))) if t == tag}
        groups[tag] = [_pair(before, after, row) for row in spread(sorted(rows.values()), per_task)]
    return groups


def _pair(before: Evaluation, after: Evaluation, row: int) -> Pair:
    (ok_before, why_before), (ok_after, why_after) = (_verdict(e, row) for e in (before, after))
    return Pair(
        prompt=before.prompts[row].text,
        before=data_uri(before.images[row]),
        after=data_uri(after.images[row]),
        before_right=ok_before,
        after_right=ok_after,
        before_verdict=why_before,
        after_verdict=why_after,
    )


def _verdict(evaluation: Evaluation, row: int) -> tuple[bool | None, str]:
    if not evaluation.verdicts:
        return None, ""
    verdict = evaluation.verdicts[row]
    return verdict.correct, "right" if verdict.correct else ", ".join(verdict.reasons).replace("_", " ")


def curves(metrics: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return the curve of the evaluation reward, then those of training; without quantities that were not logged."""
    evaluated = [m for m in metrics if "evaluation_reward" in m]
    found = []
    if evaluated:
        title = "Reward r(x₀) on the fixed evaluation set, averaged weights"
        found.append(
            Curve(title=title, steps=[m["step"] for m in evaluated], values=[m["evaluation_reward"] for m in evaluated])
        )
    for key, title in METRIC_NAMES.items():
        rows = [m for m in metrics if key in m]
        if rows:
            steps, values = [m["step"] for m in rows], [float(m[key]) for m in rows]
            found.append(Curve(title=title, steps=steps, values=values, smooth=True))
    return found


def render(page: Page) -> str:
    """Render the HTML; every value is escaped, figures are inline, and nothing is fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leapalign", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    figures = [(curve.title, curve_svg(curve)) for curve in curves(page.metrics)]
    return environment.get_template("page.html").render(
        page=page,
        figures=figures,
        task_names=TASK_NAMES,
        configuration=json.dumps(page.run, indent=2),
    )


def write_report(path: Path, page: Page) -> None:
    path.write_text(render(page), encoding="utf-8")

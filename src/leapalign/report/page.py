"""report.html: one self-contained page about a run: numbers with errors, curves, tables, images, configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.prompts.base import spread
from leapalign.report.figures import Curve, curve_svg
from leapalign.report.heat_maps import heat_map_svg, heat_maps
from leapalign.report.pictures import data_uri
from leapalign.report.tables import TASK_NAMES

if TYPE_CHECKING:
    from leapalign.evaluation.statistics import Evaluation

METRIC_NAMES = {
    "reward": "Reward of the training batch",
    "loss": "Loss",
    "grad_norm": "Gradient norm, before clipping",
}
MONITORS = {  # metric or its prefix -> title, unit, and what it tells; NAME is the rest of the metric
    "evaluation_reward": ("Training reward", "", "Mean of the reward that is trained on."),
    "held_out/": ("Held-out reward NAME", "", "Never trained on. Falls while the training reward rises: hacked."),
    "diversity/": ("Distance within a prompt, NAME", "", "Mean distance of two images of one prompt. Falls: alike."),
    "open_color_entropy": (
        "Entropy of open colours",
        "bits",
        "Colours of the shapes whose prompt names none: 2.58 if all six are equally frequent, 0 if there is one.",
    ),
    "geneval_correct": (
        "Right images",
        "",
        "Share of images that GenEval's rules find right: what the reward stands for.",
    ),
    "image/edge_density": ("Edge density", "", "Share of pixels beside an edge. Falls: lost detail and backgrounds."),
    "image/color_entropy": ("Colour entropy of an image", "bits", "Falls: fewer colours in an image."),
    "image/saturation": ("Saturation", "", "Rises: garish images."),
    "image/brightness": ("Brightness", "", "Mean luma."),
    "image/dark_share": ("Dark share", "", "Share of dark pixels."),
    "drift": ("Drift", "", "Mean |v - v_base|: how far the model has moved from its base."),
    "evaluation_fraction_above_threshold": (
        "Above the threshold",
        "",
        "Share of images whose reward lies above the threshold, and which train nothing.",
    ),
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
    exported: dict[str, Any] | None = None  # {"step", "why"} of the exported weights, as in summary.json
    stopped: str = ""  # why the run ended before its last step


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


def monitors(metrics: Sequence[dict[str, Any]], exported: int | None) -> list[Curve]:
    """Return the curves of what evaluations measured, in the order of `MONITORS`, if the run had monitors.

    `exported`: a step to mark.
    """
    evaluations = [m for m in metrics if "evaluation_reward" in m]
    names = dict.fromkeys(name for m in evaluations for name in m)
    if not any(name.startswith(tuple(MONITORS)) and not name.startswith("evaluation_") for name in names):
        return []
    found = []
    for key, (title, unit, caption) in MONITORS.items():
        for name in (name for name in names if name == key or (key.endswith("/") and name.startswith(key))):
            rows = [(m["step"], float(m[name])) for m in evaluations if name in m]
            steps, values = zip(*rows)
            title_of = title.replace("NAME", name.removeprefix(key))
            curve = Curve(title=title_of, steps=steps, values=values, unit=unit, caption=caption, marked=exported)
            found.append(curve)
    return found


def measures(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of the table of measures without a reward: words -> before, after and, if it is known, ratio."""
    rows = {}
    if "open_colors" in comparison:
        rows["Entropy of open colours, bits"] = comparison["open_colors"]["entropy"]
    rows |= {f"Distance within a prompt, {space}": row for space, row in comparison.get("diversity", {}).items()}
    for name, row in comparison.get("image_statistics", {}).items():
        rows[MONITORS[f"image/{name}"][0]] = {"ratio": None} | row
    return rows


def render(page: Page) -> str:
    """Render the HTML; every value is escaped, figures are inline, and nothing is fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leapalign", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    figures = [(curve.title, curve_svg(curve)) for curve in curves(page.metrics)]
    over_time = monitors(page.metrics, page.exported["step"] if page.exported else None)
    return environment.get_template("page.html").render(
        page=page,
        figures=figures,
        monitors=[(curve, curve_svg(curve)) for curve in over_time],
        heat_maps=[(each, heat_map_svg(each)) for each in heat_maps(page.metrics)],
        measures=measures(page.comparison),
        task_names=TASK_NAMES,
        configuration=json.dumps(page.run, indent=2),
    )


def write_report(path: Path, page: Page) -> None:
    path.write_text(render(page), encoding="utf-8")

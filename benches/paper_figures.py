"""The paper's figures on the embedded world: our numbers, the paper's statement, and whether the direction agrees.

    leapalign arena arena && leapalign arena ablations && leapalign arena ablations-guided
    python benches/paper_figures.py > paper_figures.json       # and paper_figures.png

Read are the finished runs of the studies' folders; what is missing is left out. A statement of the paper is a
difference between two of its variants; ours is the same difference, paired seed by seed, with its standard error over
seeds. It agrees or departs if it is larger than two standard errors, and is undecided otherwise. Scores: the training
reward and GenEval's overall on test prompts. The paper's are FLUX.1-dev's
(arXiv 2604.15311, Fig. 1, 4, 5, 6, Table 5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro
from shared import facts

from leapalign.errors import UserError
from leapalign.report.comparison import Number, Row, mean_with_error
from leapalign.report.records import read_evaluation, read_lines, read_object, read_row
from leapalign.report.tables import TASK_NAMES

REWARD, OVERALL, RIGHT = "evaluated/reward/reward", "geneval/overall", "geneval_correct"
GROWTH, NORM = "reward", "grad_norm"  # mean training reward of the last updates; mean norm of the gradient
TASKS = [f"geneval/{task}" for task in TASK_NAMES]
COLORS = ("#2a6fdb", "#d9822b", "#3a9a5b", "#8a4fbf", "#c23b4b", "#6b7280", "#b59b00", "#0f8b8d", "#444444")


@dataclass(frozen=True, kw_only=True)
class PaperFigures:
    """Draw the paper's figures from the studies' folders; JSON on stdout and one picture."""

    arena: Path = Path("runs/arena")
    ablations: Path = Path("runs/ablations")
    guided: Path = Path("runs/ablations-guided")
    out: Path = Path("paper_figures.png")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What the paper says: `better` has more of `number` than `worse`, two variants of a study."""

    figure: str
    study: str  # arena, ablations, guided
    better: str
    worse: str
    number: str = REWARD
    paper: str = ""


LEAP = "leapalign"
STATEMENTS = (
    Statement(figure="1a", study="arena", better=LEAP, worse="drtune", number=GROWTH, paper="reward grows faster"),
    *(
        Statement(figure="1c", study="arena", better=LEAP, worse=other, number=OVERALL, paper=words)
        for other, words in (
            ("drtune", "0.742 against 0.710"),
            ("draft-lv", "LeapAlign is best in the radar"),
            ("refl", "LeapAlign is best in the radar"),
        )
    ),
    Statement(figure="4a", study="ablations", better=LEAP, worse="alpha-0", paper="alpha 0.3 is best"),
    Statement(figure="4a", study="ablations", better=LEAP, worse="alpha-1", paper="alpha 0.3 is best"),
    Statement(figure="4b", study="ablations", better=LEAP, worse="leaps-1", paper="two leaps are better than one"),
    Statement(figure="4b", study="ablations", better=LEAP, worse="leaps-3", paper="three are no better than two"),
    *(
        Statement(figure=figure, study=study, better=LEAP, worse=worse, paper=words)
        for study in ("ablations", "guided")
        for figure, worse, words in (
            ("4c", "x_hat", "the reward of x_0 is better than that of the prediction"),
            ("4c", "x_hat-both", "the same with both distances in the weight"),
            ("4d", "weight-d_j", "both distances are better than one"),
            ("4d", "weight-d_0", "both distances are better than one"),
            ("4d", "weight-none", "the weight helps"),
        )
    ),
    Statement(
        figure="4e", study="ablations", better=LEAP, worse="late-half", number=OVERALL, paper="early steps count"
    ),
    Statement(figure="4f", study="ablations", better=LEAP, worse="fixed-distance", paper="random is slightly better"),
    *(
        Statement(figure="5", study="arena", better=LEAP, worse=other, number=RIGHT, paper="GenEval rises fastest")
        for other in ("drtune", "draft-lv", "refl")
    ),
    Statement(figure="6", study="ablations", better="nested-only-0.3", worse="nested-only-0", paper="0.3 above 0"),
    Statement(figure="6", study="ablations", better="nested-only-0", worse="nested-only-1", paper="1 below 0"),
    Statement(
        figure="6", study="ablations", better="nested-only-1", worse="nested-only-0", number=NORM, paper="norm rises"
    ),
    Statement(figure="T5", study="ablations", better=LEAP, worse="lambda-0.5", paper="0.4092 against 0.3860"),
    Statement(figure="T5", study="ablations", better=LEAP, worse="lambda-0.95", paper="0.4092 against 0.4023"),
)


@dataclass(frozen=True)
class Found:
    """The finished runs of a study's folder."""

    folder: Path

    @cached_property
    def base(self) -> Mapping[str, Number]:
        """Numbers of the base; empty if it is not evaluated."""
        file = self.folder / "base" / "evaluation.json"
        return read_evaluation(file) if file.is_file() else {}

    @cached_property
    def runs(self) -> dict[str, dict[int, Row]]:
        """Variant -> seed -> row, at equal updates."""
        if not (self.folder / "study.json").is_file():
            return {}
        study, found = read_object(self.folder / "study.json"), {}
        for contender in study["contenders"]:
            places = self.folder / "runs" / contender["name"] / f"{contender['run']['steps']}-updates"
            rows = {seed: places / f"seed-{seed}" for seed in study["seeds"]}
            kept = {seed: _row(at) for seed, at in rows.items() if (at / "evaluation" / "evaluation.json").is_file()}
            found |= {contender["name"]: kept} if kept else {}
        return found

    def mean(self, variant: str, number: str) -> Number | None:
        """Mean over seeds ± its standard error."""
        values = [row.numbers[number].value for row in self.runs.get(variant, {}).values() if number in row.numbers]
        return mean_with_error(values) if values else None

    def difference(self, better: str, worse: str, number: str) -> Number | None:
        """better - worse, paired seed by seed."""
        first, second = self.runs.get(better, {}), self.runs.get(worse, {})
        both = [(first[seed].numbers, second[seed].numbers) for seed in first if seed in second]
        values = [a[number].value - b[number].value for a, b in both if number in a and number in b]
        return mean_with_error(values) if values else None

    def curve(self, variant: str, metric: str) -> list[tuple[float, float]]:
        """Mean over seeds, at the updates that all have."""
        curves = [dict(row.curves.get(metric, ())) for row in self.runs.get(variant, {}).values()]
        if not curves:
            return []
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        return [(step, math.fsum(curve[step] for curve in curves) / len(curves)) for step in steps]


def _row(place: Path) -> Row:
    """A run's row with the mean norm of its gradients, and the mean of its curve of right images."""
    row, lines = read_row(place), read_lines(place / "metrics.jsonl")
    norms = [line[NORM] for line in lines if NORM in line]
    right = [value for _, value in row.curves.get(RIGHT, ())]
    extra = {NORM: norms, RIGHT: right}
    means = {name: Number(math.fsum(values) / len(values)) for name, values in extra.items() if values}
    return Row(name=row.name, numbers={**row.numbers, **means}, curves=row.curves)


def verdict(difference: Number) -> str:
    """agrees, departs, or undecided within two standard errors."""
    if difference.error is None or abs(difference.value) <= 2 * difference.error:
        return "undecided"
    return "agrees" if difference.value > 0 else "departs"


def judged(statement: Statement, found: Found) -> dict[str, Any] | None:
    """A statement with our numbers; None if a variant has no finished run."""
    difference = found.difference(statement.better, statement.worse, statement.number)
    if difference is None:
        return None
    both = {name: found.mean(name, statement.number) for name in (statement.better, statement.worse)}
    numbers = {name: asdict(number) for name, number in both.items() if number}
    ends = {"difference": difference.value, "error": difference.error, "verdict": verdict(difference)}
    return asdict(statement) | {"ours": numbers} | ends


def main(bench: PaperFigures) -> dict[str, Any]:
    """{"statements": each with our numbers} and facts; writes the picture. Raises UserError if nothing is finished."""
    studies = {"arena": Found(bench.arena), "ablations": Found(bench.ablations), "guided": Found(bench.guided)}
    if not any(found.runs for found in studies.values()):
        raise UserError(
            f"{bench.arena}, {bench.ablations}, {bench.guided}: no finished run; run `leapalign arena` first"
        )
    statements = [judged(statement, studies[statement.study]) for statement in STATEMENTS]
    draw(studies, bench.out)
    return {"statements": [statement for statement in statements if statement]} | facts(bench)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A panel of bars: the variants of one ablation."""

    title: str
    study: str
    variants: Sequence[str]
    number: str = REWARD
    names: Mapping[str, str] = field(default_factory=dict)  # variant -> label, where they differ


def _panels() -> list[Bars]:
    weights = ("weight-none", "weight-d_j", "weight-d_0", LEAP)
    thresholds = {"lambda-0.5": "0.5", LEAP: "0.65", "lambda-0.8": "0.8", "lambda-0.95": "0.95"}
    nested = {f"nested-only-{alpha}": alpha for alpha in ("0", "0.3", "1")}
    alphas = {"alpha-0": "0", LEAP: "0.3", "alpha-1": "1"}
    leaps = {"leaps-1": "1", LEAP: "2", "leaps-3": "3"}
    inputs = {LEAP: "x_0", "x_hat": "x_hat, d_j", "x_hat-both": "x_hat, both"}
    weighed = {"weight-none": "none", "weight-d_j": "d_j", "weight-d_0": "d_0", LEAP: "both"}
    return [
        Bars(title="4a  discount alpha", study="ablations", variants=list(alphas), names=alphas),
        Bars(title="4b  leaps", study="ablations", variants=list(leaps), names=leaps),
        Bars(title="4c  image that the reward sees", study="ablations", variants=list(inputs), names=inputs),
        Bars(title="4d  weight by distance", study="ablations", variants=weights, names=weighed),
        Bars(title="4c  at guidance 4", study="guided", variants=list(inputs), names=inputs),
        Bars(title="4d  at guidance 4", study="guided", variants=weights, names=weighed),
        Bars(
            title="4e  steps, GenEval",
            study="ablations",
            variants=("late-half", LEAP),
            number=OVERALL,
            names={"late-half": "[0, 1/2]", LEAP: "[0, 1]"},
        ),
        Bars(
            title="4f  distance of k and j",
            study="ablations",
            variants=("fixed-distance", LEAP),
            names={"fixed-distance": "fixed 1/2", LEAP: "random"},
        ),
        Bars(title="6  nested gradient only, alpha", study="ablations", variants=list(nested), names=nested),
        Bars(title="6  gradient norm, alpha", study="ablations", variants=list(nested), number=NORM, names=nested),
        Bars(title="Table 5  threshold lambda", study="ablations", variants=list(thresholds), names=thresholds),
        Bars(
            title="Table 5  lambda, GenEval",
            study="ablations",
            variants=list(thresholds),
            number=OVERALL,
            names=thresholds,
        ),
    ]


def draw(studies: Mapping[str, Found], file: Path) -> None:
    """Fifteen panels; what has no finished run stays empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 5)
    arena = studies["arena"]
    _curves(figure.add_subplot(grid[0, 0]), arena, GROWTH, "1a  reward of the training batch", smooth=15)
    _radar(figure.add_subplot(grid[0, 1], projection="polar"), arena)
    _curves(figure.add_subplot(grid[0, 2]), arena, RIGHT, "5  right images during training")
    for place, bars in zip(range(3, 15), _panels()):
        _bars(figure.add_subplot(grid[place // 5, place % 5]), studies[bars.study], bars)
    figure.savefig(file, dpi=100)


def _curves(axes: Any, found: Found, metric: str, title: str, smooth: int = 1) -> None:
    for variant, color in zip(found.runs, COLORS):
        points = found.curve(variant, metric)
        if points:
            steps, values = zip(*points)
            pieces = [values[max(0, i - smooth + 1) : i + 1] for i in range(len(values))]
            axes.plot(steps, [math.fsum(piece) / len(piece) for piece in pieces], color=color, label=variant)
    axes.set(title=title, xlabel="update")
    axes.grid(alpha=0.25)
    if found.runs:
        axes.legend(frameon=False, fontsize=7)


def _radar(axes: Any, found: Found) -> None:
    angles = [2 * math.pi * i / len(TASKS) for i in range(len(TASKS))]
    rows = {name: [found.mean(name, task) for task in TASKS] for name in found.runs}
    rows |= {"base": [found.base.get(task) for task in TASKS]} if found.base else {}
    for (name, numbers), color in zip(rows.items(), (*COLORS, "#000000")):
        values = [number.value if number else math.nan for number in numbers]
        style: dict[str, Any] = {"linestyle": "--"} if name == "base" else {}
        axes.plot([*angles, angles[0]], [*values, values[0]], color="#000000" if style else color, label=name, **style)
    axes.set_xticks(angles, [TASK_NAMES[task.removeprefix("geneval/")] for task in TASKS], fontsize=8)
    axes.set_title("1c  GenEval by task")
    if rows:
        axes.legend(frameon=False, fontsize=6, loc="lower right", bbox_to_anchor=(1.35, -0.1))


def _bars(axes: Any, found: Found, bars: Bars) -> None:
    numbers = {name: found.mean(name, bars.number) for name in bars.variants}
    shown = {name: number for name, number in numbers.items() if number}
    values, errors = [n.value for n in shown.values()], [n.error or 0.0 for n in shown.values()]
    colors = [COLORS[0] if name == LEAP else "#9aa3af" for name in shown]
    axes.bar([bars.names.get(name, name) for name in shown], values, yerr=errors, color=colors, capsize=3)
    if values:
        low, high = min(v - e for v, e in zip(values, errors)), max(v + e for v, e in zip(values, errors))
        room = 0.35 * (high - low) or 0.01
        axes.set_ylim(max(0.0, low - room), high + room)
    axes.set_title(bars.title)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(PaperFigures)), indent=2))

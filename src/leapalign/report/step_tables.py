"""Tables and figures by sampling step, from the JSON values of `leapalign diagnose`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from leapalign.report.tables import TASK_NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from leapalign.evaluation.statistics import Images

COLORS = ("#1f5fa8", "#b8501f", "#3f8f4f", "#7a4fa0", "#8a6d1d", "#4a8f9f", "#a03f6a", "#222222")
TILE = 160  # pixels of an image on a sheet, at most (larger images are averaged)


class Line(NamedTuple):
    """A line of a figure: a value and its standard error at each label of the x axis; None is left out."""

    name: str
    values: Sequence[tuple[float, float] | None]


class Panel(NamedTuple):
    """One part of a figure."""

    title: str
    x: str
    y: str
    labels: Sequence[str]  # of the x axis
    lines: Sequence[Line]


def swap_table(answer: Mapping[str, Any]) -> str:
    """Format one line for each step at which the second prompt was swapped in."""
    rows = answer["steps"]
    tasks, rewards = list(rows[0].get("geneval", {})), list(rows[0]["rewards"])
    names = [*map(_task, tasks), *(["first prompt"] if tasks else []), *(f"{name}, share" for name in rewards)]
    widths = [max(14, len(name)) for name in names]
    lines = [
        f"{answer['images']} images a step, ± one standard error: share that obeys the second prompt, swapped in at a "
        f"step ({answer['num_steps']} is the noisiest)",
        "  ".join(["step  sigma", *(f"{name:>{width}}" for name, width in zip(names, widths))]),
    ]
    for row in rows:
        cells = [_pm(row["geneval"][task]["second"], "accuracy") for task in tasks]
        cells += [_pm(row["geneval"]["overall"]["first"], "accuracy")] if tasks else []
        cells += [_pm(row["rewards"][name], "share") for name in rewards]
        line = [f"{row['step']:4}  {row['sigma']:5.3f}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths))]
        lines.append("  ".join(line))
    return "\n".join([*lines, *_half_lines(answer)])


def _half_lines(answer: Mapping[str, Any]) -> list[str]:
    known = {name: step for name, step in answer["half"].items() if step is not None}
    text = ", ".join(f"{_task(name)} {step}" for name, step in known.items())
    return [f"last step at which a swap still has half of its effect: {text}"] if known else []


def _task(name: str) -> str:
    return TASK_NAMES.get(name, name)


def _pm(row: Mapping[str, Any], key: str) -> str:
    return "-" if row[key] is None else f"{row[key]:.3f} ± {row['standard_error']:.3f}"


def swap_panels(answer: Mapping[str, Any]) -> list[Panel]:
    """Return the curves of GenEval's tasks and of the rewards over the step of the swap."""
    rows, x = answer["steps"], "second prompt swapped in at step (0 = never)"
    labels = [str(row["step"]) for row in rows]
    panels = []
    if "geneval" in rows[0]:
        obeyed = [
            Line(_task(task), [_point(row["geneval"][task]["second"], "accuracy") for row in rows])
            for task in rows[0]["geneval"]
        ]
        first = Line("first prompt, overall", [_point(r["geneval"]["overall"]["first"], "accuracy") for r in rows])
        panels.append(Panel("GenEval", x, "share that obeys the second prompt", labels, [*obeyed, first]))
    lines = [Line(name, [_point(row["rewards"][name], "share") for row in rows]) for name in rows[0]["rewards"]]
    if any(point for line in lines for point in line.values):
        panels.append(Panel("Rewards", x, "share of the second prompt's effect", labels, lines))
    return panels


def _point(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    return None if row[key] is None else (row[key], row["standard_error"])


def exchange_table(answer: Mapping[str, Any]) -> str:
    """Format a block for GenEval's overall and each reward: the gain with tuned weights in some steps only."""
    head = f"{answer['images']} images, ± one standard error of the paired change; step {answer['num_steps']} is the "
    return "\n".join([f"{head}noisiest", *(_exchange_block(answer, *place) for place in _places(answer))])


def _places(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where the numbers of a comparison are: GenEval's overall and the rewards; tasks are in the JSON."""
    overall = [("geneval", "overall")] if "geneval" in answer["tuned"] else []
    return overall + [("rewards", name) for name in answer["tuned"]["rewards"]]


def _exchange_block(answer: Mapping[str, Any], kind: str, name: str) -> str:
    whole = answer["tuned"][kind][name]
    lines = [
        f"{_task(name)}: base {whole['before']:.3f} ± {whole['before_standard_error']:.3f}, tuned "
        f"{whole['after']:.3f} ± {whole['after_standard_error']:.3f}, gain {_change(whole, whole)}",
        f"  {'steps':8}{'tuned in these alone':>28}{'tuned in all others':>28}",
    ]
    for row in answer["ranges"]:
        there, elsewhere = (_change(row[key][kind][name], whole) for key in ("only_there", "everywhere_else"))
        lines.append(f"  {row['steps']:8}{there:>28}{elsewhere:>28}")
    return "\n".join(lines)


def _change(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Format a change; and its share of the whole gain, if that is known to be one (two standard errors)."""
    text, gain = f"{row['difference']:+.3f} ± {row['difference_standard_error']:.3f}", whole["difference"]
    known = row is not whole and gain > 2 * whole["difference_standard_error"]
    return f"{text} ({row['difference'] / gain:4.0%})" if known else text


def exchange_panels(answer: Mapping[str, Any]) -> list[Panel]:
    """Return a panel for GenEval's overall and each reward."""
    rows, x = answer["ranges"], "steps"
    panels = []
    for kind, name in _places(answer):
        lines = [
            Line(words, [_difference(row[key][kind][name]) for row in rows])
            for key, words in (("only_there", "tuned there alone"), ("everywhere_else", "tuned in all other steps"))
        ]
        whole = Line("tuned in all steps", [_difference(answer["tuned"][kind][name])] * len(rows))
        title = "GenEval overall" if kind == "geneval" else name
        panels.append(Panel(title, x, "change against the base", [row["steps"] for row in rows], [*lines, whole]))
    return panels


def _difference(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["difference"], row["difference_standard_error"]


def draw_panels(panels: Sequence[Panel], file: Path) -> None:
    """Write a PNG with the panels side by side; error bars are one standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * max(1, len(panels)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels):
        for line, color in zip(panel.lines, COLORS * (1 + len(panel.lines) // len(COLORS))):
            known = [(i, *point) for i, point in enumerate(line.values) if point]
            if known:
                x, y, error = zip(*known)
                axes.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, color=color, label=line.name)
        axes.set_xticks(range(len(panel.labels)), panel.labels)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def draw_sheet(columns: Sequence[Images], rows: Sequence[int], file: Path) -> None:
    """Write a PNG with the images `rows` of each column, one column beside the other."""
    from leapalign.report.pictures import grid

    images = [_tile(images[row]) for row in rows for images in columns]
    grid(images, len(columns), max(1, TILE // 2 // images[0].shape[-1])).save(file)


def _tile(image: Tensor) -> Tensor:
    """Average an image [3, H, W] down by a whole factor, to at most TILE pixels."""
    from torch.nn.functional import avg_pool2d

    factor = -(-max(image.shape[-2:]) // TILE)
    return avg_pool2d(image, factor) if factor > 1 else image

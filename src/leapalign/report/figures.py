"""Curves as inline SVG with the colours and font of the page, for light and dark mode.

matplotlib draws with placeholder colours, which become CSS variables; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INK, FAINT, ACCENT = "#010101", "#020202", "#030303"  # placeholders: nothing else is drawn in these colours
SERIES = tuple(f"#0401{i:02d}" for i in range(10))
VARIABLES = {INK: "var(--muted)", FAINT: "var(--line)", ACCENT: "var(--accent)"}
VARIABLES |= {color: f"var(--s{i})" for i, color in enumerate(SERIES)}
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A logged quantity over the steps of a run."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False  # a noisy quantity: drawn faint, with a running mean over it
    unit: str = ""
    caption: str = ""  # what the quantity tells, for the page
    marked: float | None = None  # a step to mark: the exported one


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Running mean over `width` values, fewer at the ends."""
    half = width // 2
    pieces = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(piece) / len(piece) for piece in pieces]


def curve_svg(curve: Curve) -> str:
    """Draw an <svg> element, 420 × 230, without external resources."""
    figure, axes = _axes("step", curve.unit)
    if curve.smooth:
        axes.plot(curve.steps, curve.values, color=ACCENT, linewidth=0.9, alpha=0.35)
        width = max(3, len(curve.values) // 12)
        axes.plot(curve.steps, running_mean(curve.values, width), color=ACCENT, linewidth=2)
    else:
        axes.plot(curve.steps, curve.values, color=ACCENT, linewidth=2, marker="o", markersize=4)
    if curve.marked is not None:
        axes.axvline(curve.marked, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    _whole_steps(axes)
    return _inline(figure, curve.title)


def lines_svg(title: str, lines: Mapping[int, Points], *, smooth: bool = False) -> str:
    """Draw several lines over the updates: index of the series, which chooses its colour -> points."""
    figure, axes = _axes("update", "")
    for series, points in lines.items():
        steps, values = zip(*points)
        if smooth:
            values = running_mean(values, max(3, len(values) // 12))
        marker = "o" if len(steps) < 20 else ""
        axes.plot(steps, values, color=SERIES[series % len(SERIES)], linewidth=1.6, marker=marker, markersize=3)
    _whole_steps(axes)
    return _inline(figure, title)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point with its standard errors (0 = none or unknown)."""

    name: str
    series: int  # its colour
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    hollow: bool = False  # drawn as a ring


def scatter_svg(title: str, points: Sequence[Point], x: str, y: str) -> str:
    """Draw named points with bars of one standard error; those that no other exceeds in both are joined."""
    figure, axes = _axes(x, y)
    for point in points:
        color = SERIES[point.series % len(SERIES)]
        face = "none" if point.hollow else color
        bars = {"xerr": point.x_error or None, "yerr": point.y_error or None}
        axes.errorbar(point.x, point.y, **bars, fmt="o", color=color, markerfacecolor=face, markersize=6, linewidth=1)
        axes.annotate(point.name, (point.x, point.y), (5, 4), textcoords="offset points", fontsize=8, color=INK)
    front = sorted((point.x, point.y) for point in pareto(points))
    if len(front) > 1:
        axes.plot(*zip(*front), color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.margins(x=0.18, y=0.14)
    return _inline(figure, title)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other exceeds in one number without falling short in the other."""

    def beaten(p: Point) -> bool:
        return any(q.x >= p.x and q.y >= p.y and (q.x > p.x or q.y > p.y) for q in points)

    return [point for point in points if not beaten(point)]


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03, y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    return figure, axes


def _whole_steps(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _inline(figure, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    label = title.replace('"', "'")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)

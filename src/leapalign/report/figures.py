"""Curves as inline SVG with the colours and font of the page, for light and dark mode.

matplotlib draws with placeholder colours, which become CSS variables; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

INK, FAINT, ACCENT = "#010101", "#020202", "#030303"  # placeholders: nothing else is drawn in these colours
VARIABLES = {INK: "var(--muted)", FAINT: "var(--line)", ACCENT: "var(--accent)"}


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
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    if curve.smooth:
        axes.plot(curve.steps, curve.values, color=ACCENT, linewidth=0.9, alpha=0.35)
        width = max(3, len(curve.values) // 12)
        axes.plot(curve.steps, running_mean(curve.values, width), color=ACCENT, linewidth=2)
    else:
        axes.plot(curve.steps, curve.values, color=ACCENT, linewidth=2, marker="o", markersize=4)
    if curve.marked is not None:
        axes.axvline(curve.marked, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_ylabel(curve.unit, color=INK, fontsize=9)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    return _inline(figure, curve.title)


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

"""Heat maps over pairs of steps (k, j), from the table `by_steps` in a run's metrics: means over all its samples.

SVG with the colours of the page; a cell's opacity is its value over the largest one, and its tooltip tells the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CELLS, LEFT, TOP = 200, 26, 6  # size of the square of cells, and its place, in the figure's units
MAPS = {  # column of the table -> title, and what it tells
    "samples": ("Samples", "How often each pair was drawn."),
    "d_j": ("Distance at j", "Mean |x_j - x̂_j|: how far the leap from k misses the rollout."),
    "d_0": ("Distance at the image", "Mean |x_0 - x̂_0|: how far the leap from j misses the image."),
    "weight": ("Weight", "Of a sample in the loss: small where the leaps miss."),
    "grad_single/j": ("Gradient at v(x_j)", "Single-step: σ_j |G|, with G the sample's gradient at x̂_0."),
    "grad_single/k": ("Gradient at v(x_k), single-step", "(σ_k - σ_j) |G|."),
    "grad_nested/k": ("Gradient at v(x_k), nested", "The part that has passed v(x_j), with its factor α."),
}


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values by (k, j), k > j >= 1."""

    title: str
    caption: str
    values: Mapping[tuple[int, int], float]


def heat_maps(metrics: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """Return the maps of a run whose method leaps twice; none for others."""
    tables = [m["by_steps"] for m in metrics if {"k", "j"} <= m.get("by_steps", {}).keys()]
    counts: dict[tuple[int, int], float] = {}
    sums: dict[str, dict[tuple[int, int], float]] = {name: {} for name in MAPS if name != "samples"}
    for table in tables:
        for row, pair in enumerate(zip(table["k"], table["j"])):
            counts[pair] = counts.get(pair, 0) + table["samples"][row]
            for name, sum_of in sums.items():
                sum_of[pair] = sum_of.get(pair, 0) + table["samples"][row] * table[name][row]
    means = {name: {pair: total / counts[pair] for pair, total in sum_of.items()} for name, sum_of in sums.items()}
    values = {"samples": counts} | means
    return [HeatMap(title=MAPS[n][0], caption=MAPS[n][1], values=values[n]) for n in MAPS if tables]


def heat_map_svg(heat_map: HeatMap) -> str:
    """Draw an <svg> element, 240 wide: k to the right, j upwards."""
    most_k, most_j = (max(steps) for steps in zip(*heat_map.values))
    top, size = max(heat_map.values.values()), CELLS / (most_k - 1)
    bottom = TOP + most_j * size
    shapes = [
        f'<rect x="{LEFT + (k - 2) * size:.2f}" y="{bottom - j * size:.2f}" width="{size:.2f}" height="{size:.2f}" '
        f'fill="var(--accent)" fill-opacity="{value / top if top else 0:.3f}" stroke="var(--line)" stroke-width="0.5">'
        f"<title>k = {k}, j = {j}: {value:.4g}</title></rect>"
        for (k, j), value in heat_map.values.items()
    ]
    for step in _ticks(2, most_k):
        shapes.append(_text(LEFT + (step - 1.5) * size, bottom + 11, str(step)))
    for step in _ticks(1, most_j):
        shapes.append(_text(LEFT - 9, bottom - (step - 0.5) * size + 3, str(step)))
    shapes.append(_text(LEFT + CELLS / 2, bottom + 23, f"k    (full colour: {top:.3g})"))
    shapes.append(_text(6, (TOP + bottom) / 2 + 3, "j"))
    label = f"{heat_map.title} by k and j, at most {top:.3g}"
    height = bottom + 30
    return f'<svg viewBox="0 0 240 {height:.0f}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _ticks(first: int, last: int) -> range:
    return range(first, last + 1, max(1, (last - first) // 6))


def _text(x: float, y: float, words: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="9" fill="var(--muted)" '
        f'xml:space="preserve">{words}</text>'
    )

"""The page of a comparison: tables with the best in bold, curves over the updates, score against diversity, settings.

Self-contained: figures are inline, every value is escaped, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leapalign.report.comparison import Column, Comparison, Row
from leapalign.report.figures import SERIES, Point, lines_svg, scatter_svg
from leapalign.report.page import METRIC_NAMES, MONITORS

NOT_SETTINGS = ("name", "out", "seed")  # of run.json: they differ on purpose


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points of score against diversity."""

    title: str
    points: Sequence[Point]
    x: str
    y: str


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """Content of the page. Rows with the same name in several tables have the same colour."""

    comparison: Comparison  # its rows have the curves
    others: Sequence[Comparison] = ()  # further tables
    lead: str = ""
    scatters: Sequence[Scatter] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


def render_comparison(page: ComparisonPage) -> str:
    """Return the HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leapalign", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows = page.comparison.rows
    return environment.get_template("comparison.html").render(
        page=page,
        tables=[_table(each, rows, first=not i) for i, each in enumerate((page.comparison, *page.others))],
        charts=charts(rows),
        legend=[(row.name, i % len(SERIES)) for i, row in enumerate(rows) if row.curves],
        scatters=[(s.title, scatter_svg(s.title, s.points, s.x, s.y)) for s in page.scatters],
        settings=differing_settings(rows),
        settings_of=[row.name for row in rows if row.settings],
    )


def charts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return a title and a figure for each metric that some row has at two updates or more."""
    found = []
    for name in dict.fromkeys(name for row in rows for name in row.curves):
        lines = {i: row.curves[name] for i, row in enumerate(rows) if len(row.curves.get(name, ())) > 1}
        if lines:
            title = title_of(name)
            found.append((title, lines_svg(title, lines, smooth=name == "reward")))
    return found


def title_of(metric: str) -> str:
    """Return the words for a metric, as a run's own report has them."""
    if metric in METRIC_NAMES:
        return METRIC_NAMES[metric]
    for key, (title, unit, _) in MONITORS.items():
        if metric == key or (key.endswith("/") and metric.startswith(key)):
            return title.replace("NAME", metric.removeprefix(key)) + (f", {unit}" if unit else "")
    return metric


def differing_settings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return place in run.json -> the value of each row that has settings, where they differ."""
    runs = [row.settings for row in rows if row.settings]
    places = dict.fromkeys(place for settings in runs for place in settings if place not in NOT_SETTINGS)
    values = {place: [settings.get(place, "") for settings in runs] for place in places}
    return {place: each for place, each in values.items() if len(set(each)) > 1}


def _table(comparison: Comparison, rows: Sequence[Row], *, first: bool) -> dict[str, Any]:
    """Return what the template shows of a table; `rows` have the colours."""
    colors = {row.name: i % len(SERIES) for i, row in enumerate(rows)}
    best = {column.key: comparison.best(column) for column in comparison.columns}
    shown_rows = []
    for index, row in enumerate(comparison.rows):
        cells = [{"value": row.words.get(title, ""), "error": "", "best": False} for title in comparison.word_titles]
        cells += [_cell(row, column, index in best[column.key]) for column in comparison.columns]
        shown_rows.append({"name": row.name, "series": colors.get(row.name, 0), "cells": cells})
    titles = [*comparison.word_titles, *(column.title for column in comparison.columns)]
    return {
        "title": "" if first else comparison.title,
        "note": comparison.note,
        "titles": titles,
        "rows": shown_rows,
    }


def _cell(row: Row, column: Column, best: bool) -> dict[str, Any]:
    number = row.numbers.get(column.key)
    if number is None:
        return {"value": "", "error": "", "best": False}
    error = "" if number.error is None else f"{number.error:{column.form}}"
    return {"value": f"{number.value:{column.form}}", "error": error, "best": best}

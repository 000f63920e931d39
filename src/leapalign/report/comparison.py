"""A table of runs or methods: one row each, numbers with their standard errors, the best of each column marked.

Which end of a column is best is a fact of the column: rewards, accuracies and diversity are best high, times low.
Others (updates, learning rate, drift) have no best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from leapalign.report.tables import TASK_NAMES

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Number:
    """A finite value and, if it is known, its standard error."""

    value: float
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measured quantity. `key` is the metric's name, or ends with "/" for all metrics that begin with it."""

    key: str
    title: str  # NAME stands for the rest of the metric's name
    better: Better = ""
    form: str = ".3f"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, evaluation or method."""

    name: str
    words: Mapping[str, str] = field(default_factory=dict)  # title -> text, in columns before those of numbers
    numbers: Mapping[str, Number] = field(default_factory=dict)  # key of a column -> value
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)  # metric -> (update, value)
    settings: Mapping[str, str] = field(default_factory=dict)  # place in run.json -> value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows over the same columns. `note` says what ± is."""

    title: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    note: str

    def best(self, column: Column) -> frozenset[int]:
        """Indices of the rows with the best value; none where a column has no best, or fewer than two values."""
        values = {i: row.numbers[column.key].value for i, row in enumerate(self.rows) if column.key in row.numbers}
        if not column.better or len(values) < 2:
            return frozenset()
        best = (max if column.better == "higher" else min)(values.values())
        return frozenset(i for i, value in values.items() if value == best)

    @property
    def word_titles(self) -> list[str]:
        """Titles of the columns of text."""
        return list(dict.fromkeys(title for row in self.rows for title in row.words))


COLUMNS = (
    Column(key="steps", title="updates", form=".0f"),
    Column(key="learning_rate", title="learning rate", form=".3g"),
    Column(key="seconds", title="s per update", better="lower"),
    Column(key="clipped", title="updates clipped", form=".2f"),
    Column(key="reward", title="training reward", better="higher"),
    Column(key="evaluation_reward", title="evaluation reward", better="higher"),
    Column(key="held_out/", title="held out, NAME", better="higher"),
    Column(key="diversity/", title="distance, NAME", better="higher"),
    Column(key="open_color_entropy", title="open colours, bits", better="higher"),
    Column(key="geneval_correct", title="right images", better="higher"),
    Column(key="drift", title="drift", form=".3g"),
    Column(key="geneval/overall", title="GenEval overall", better="higher"),
    *(Column(key=f"geneval/{tag}", title=words, better="higher") for tag, words in TASK_NAMES.items()),
    Column(key="geneval/", title="NAME", better="higher"),
    Column(key="evaluated/reward/", title="NAME, evaluated", better="higher"),
    Column(key="evaluated/diversity/", title="distance, NAME, evaluated", better="higher"),
    Column(key="evaluated/open_color_entropy", title="open colours, bits, evaluated", better="higher"),
)


def columns_of(rows: Sequence[Row], known: Sequence[Column] = COLUMNS) -> list[Column]:
    """Return the columns that some row has a number for, in the order of `known`."""
    keys, found = list(dict.fromkeys(key for row in rows for key in row.numbers)), []
    for column in known:
        if column.key.endswith("/"):
            taken = {each.key for each in found}
            own = [key for key in keys if key.startswith(column.key) and key not in taken]
            found += [replace(column, key=k, title=column.title.replace("NAME", k[len(column.key) :])) for k in own]
        elif column.key in keys:
            found.append(column)
    return found


def shown(number: Number | None, column: Column, plus_minus: str = " ± ") -> str:
    """Format a number with its error, with as many digits as the column has; "" for none."""
    if number is None:
        return ""
    error = "" if number.error is None else f"{plus_minus}{number.error:{column.form}}"
    return f"{number.value:{column.form}}{error}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the table as JSON values."""
    best = {column.key: comparison.best(column) for column in comparison.columns}
    rows = []
    for index, row in enumerate(comparison.rows):
        numbers = {
            column.key: {
                "value": number.value,
                "standard_error": number.error,
                "best": index in best[column.key],
            }
            for column in comparison.columns
            if (number := row.numbers.get(column.key)) is not None
        }
        rows.append({"name": row.name, **row.words, "numbers": numbers})
    columns = [{"key": c.key, "title": c.title, "better": c.better or None} for c in comparison.columns]
    return {"title": comparison.title, "note": comparison.note, "columns": columns, "rows": rows}


def mean_with_error(values: Sequence[float]) -> Number:
    """Mean of independent values with its standard error, s / sqrt(n); a single value has none."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Number(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Number(mean, math.sqrt(variance / len(values)))

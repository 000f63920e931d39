"""A comparison as text: Markdown, CSV, LaTeX, and a table for the terminal. The best of each column is bold."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence

from leapalign.report.comparison import Column, Comparison, shown

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
BOLD = "\0"  # begins a cell that is shown bold in the terminal
PADDING = 3  # of a column
LOG_WIDTH = 160  # of tables that are not printed on a terminal


def markdown(comparison: Comparison) -> str:
    """Format a GitHub table; the best is **bold**."""
    titles = ["", *comparison.word_titles, *(column.title for column in comparison.columns)]
    rules = ["---"] * (1 + len(comparison.word_titles)) + ["---:"] * len(comparison.columns)
    rows = [titles, rules, *_cells(comparison, _plain, lambda text: f"**{text}**")]
    lines = ["| " + " | ".join(_one_line(cell).replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + f"\n\n{comparison.note}\n"


def latex(comparison: Comparison) -> str:
    """Format a tabular that needs no package; the best is bold."""
    words = 1 + len(comparison.word_titles)
    titles = ["", *comparison.word_titles, *(column.title for column in comparison.columns)]

    def number(text: str) -> str:
        return f"${text}$" if text else ""

    body = _cells(comparison, lambda c, n: number(shown(n, c, r" \pm ")), lambda text: rf"$\mathbf{{{text[1:-1]}}}$")
    lines = [rf"\begin{{tabular}}{{{'l' * words}{'r' * len(comparison.columns)}}}", r"\hline"]
    lines += [" & ".join(latex_text(title) for title in titles) + r" \\", r"\hline"]
    for cells in body:
        shown_cells = [*(latex_text(cell) for cell in cells[:words]), *cells[words:]]
        lines.append(" & ".join(shown_cells) + r" \\")
    lines += [r"\hline", r"\end{tabular}", *(f"% {line}" for line in comparison.note.splitlines())]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Escape the characters that LaTeX reads as commands."""
    return "".join(LATEX.get(letter, letter) for letter in _one_line(text))


def comma_separated(comparison: Comparison) -> str:
    """Format CSV with all digits: name, words, then each number and, where one is known, its standard error."""
    with_error = {
        column.key: any(n.error is not None for row in comparison.rows if (n := row.numbers.get(column.key)))
        for column in comparison.columns
    }
    header = ["name", *comparison.word_titles]
    for column in comparison.columns:
        header += [column.key] + ([f"{column.key}_standard_error"] if with_error[column.key] else [])
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in comparison.rows:
        cells = [row.name, *(row.words.get(title, "") for title in comparison.word_titles)]
        for column in comparison.columns:
            number = row.numbers.get(column.key)
            cells.append("" if number is None else repr(number.value))
            if with_error[column.key]:
                cells.append("" if number is None or number.error is None else repr(number.error))
        writer.writerow(cells)
    return file.getvalue()


def print_comparison(comparison: Comparison) -> None:
    """Print the table; columns that the terminal has no room for follow below, in a table of the same rows."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    words = len(comparison.word_titles)
    titles = [*comparison.word_titles, *(column.title for column in comparison.columns)]
    rows = list(_cells(comparison, _plain, lambda text: f"{BOLD}{text}"))
    widths = [_width(title, [row[1 + place] for row in rows]) for place, title in enumerate(titles)]
    name = max(len(row[0]) for row in rows)
    for first, columns in _blocks(widths, console.width - name - PADDING):
        table = Table(box=SIMPLE, title=escape(comparison.title) if first else None)
        table.add_column("", width=name)
        for place in columns:
            justify = "left" if place < words else "right"
            table.add_column(escape(titles[place]), justify=justify, width=widths[place])
        for row in rows:
            cells = (escape(row[1 + place]) for place in columns)
            bold = (f"[bold]{c.removeprefix(BOLD)}[/]" if c.startswith(BOLD) else c for c in cells)
            table.add_row(escape(row[0]), *bold)
        console.print(table)
    console.print(comparison.note, markup=False, highlight=False, soft_wrap=True)


def _width(title: str, cells: Sequence[str]) -> int:
    """Width of a column: titles fold between words, cells do not."""
    return max(len(text) for text in (*title.split(), *(cell.removeprefix(BOLD) for cell in cells)))


def _blocks(widths: Sequence[int], room: int) -> Iterator[tuple[bool, list[int]]]:
    """Yield (True for the first, places of the columns) of tables that fit."""
    columns: list[int] = []
    used, first = 0, True
    for place, width in enumerate(widths):
        if columns and used + width + PADDING > room:
            yield first, columns
            columns, used, first = [], 0, False
        columns.append(place)
        used += width + PADDING
    yield first, columns


def _cells(comparison: Comparison, number: Callable[..., str], bold: Callable[[str], str]) -> Iterator[list[str]]:
    """Yield the cells of each row: name, words, numbers."""
    best = {column.key: comparison.best(column) for column in comparison.columns}
    for index, row in enumerate(comparison.rows):
        cells = [row.name, *(row.words.get(title, "") for title in comparison.word_titles)]
        for column in comparison.columns:
            text = number(column, row.numbers.get(column.key))
            cells.append(bold(text) if index in best[column.key] else text)
        yield cells


def _plain(column: Column, number) -> str:
    return shown(number, column)


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""Print a plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from leapalign.planning.plan import Plan


def size(count: int) -> str:
    """Format a number of bytes with three digits and decimal units, as in "1.25 GB"."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def as_text(plan: Plan, width: int = 100) -> str:
    """Format the plan as tables and notes, and a last line with the peak and the bytes to download."""
    console = Console(width=width, record=True, file=StringIO(), highlight=False)
    console.print(f"Plan of {plan.name} on {plan.device}: nothing was downloaded or loaded.\n", markup=False)
    for table in _tables(plan):
        console.print(table)
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False)
    console.print(f"\nPeak {size(plan.peak)}; to download {size(plan.to_download)}.", markup=False)
    return console.export_text().rstrip()


def _tables(plan: Plan) -> Iterable[Table]:
    words = {"samples_per_draw": "samples that share a draw", "forwards": "forwards (mean)"}
    geometry = [(words.get(key, key.replace("_", " ")), f"{value:,}") for key, value in plan.geometry.items()]
    yield _table("An update", ("", ""), geometry)
    yield _table("Weights", ("part", "number"), [(name, f"{count:,}") for name, count in plan.parameters.items()])
    yield _table("Memory, always", ("part", "bytes"), _sizes(plan.memory.items()))
    rows = [
        (f"{name} (this run)" if name == plan.graph else name, size(g.kept), size(g.rollout), size(g.backward))
        for name, g in plan.graphs.items()
    ]
    yield _table("One micro-batch by graph", ("graph", "kept", "peak of rollout", "peak of backward"), rows)
    yield _table("Memory by phase, all included", ("phase", "peak"), _sizes(plan.phases.items()))
    prompts = plan.prompts
    most = size(prompts["limit"]) if prompts["limit"] else "in memory"
    cache = [(f"{prompts['number']:,}", size(prompts["bytes_each"]), size(prompts["bytes"]), most)]
    yield _table("Prompt cache", ("prompts", "each", "all", "limit on disk"), cache)
    if plan.downloads:
        state = {True: "in the cache", False: "to fetch"}
        fetched = [(d.repo, d.what, size(d.bytes) if d.bytes else "?", state[d.cached]) for d in plan.downloads]
        yield _table("Downloads", ("from", "what", "about", ""), fetched)
    yield _table("Disk", ("what", "at most"), _sizes(plan.disk.items()))


def _sizes(items: Iterable[tuple[str, int]]) -> list[tuple[str, str]]:
    return [(name, size(count)) for name, count in items]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns), box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table

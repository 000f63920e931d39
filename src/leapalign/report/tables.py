"""Tables for a terminal, from the JSON values that commands return."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

TASK_NAMES = {
    "single_object": "Single object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colours",
    "position": "Position",
    "color_attr": "Attribute binding",
}
REWARD_FACTS = {  # fact -> its label
    "resolution": "sees",
    "output_range": "answers",
    "memory": "memory",
    "code_licence": "code",
    "weights_licence": "weights",
}
MARKS = {"good": "[green]ok[/]", "different": "[bold red]DIFFERS[/]", "note": "[dim]note[/]"}


def evaluation_table(answer: Mapping[str, Any]) -> str:
    """Format one line for each task, reward and monitor of an evaluation, or of the comparison of two."""
    rows = answer.get("geneval", {}) | answer["rewards"]
    rows |= {f"distance, {space}": row for space, row in answer["diversity"].items()} | answer["image_statistics"]
    lines = [_evaluation_line(name, row) for name, row in rows.items()]
    if "open_colors" in answer:
        lines.append(_colors_line(answer["open_colors"]["entropy"]))
    return "\n".join([f"{answer['images']} images, ± one standard error", *lines])


def _evaluation_line(name: str, row: Mapping[str, Any]) -> str:
    if "difference" not in row:
        value = row["accuracy"] if "accuracy" in row else row["mean"]
        failures = f"   without a number: {row['failures']}" if row.get("failures") else ""
        return f"  {name:24}{value:.3f} ± {row['standard_error']:.3f}{failures}"
    cells = [f"{row[key]:.3f} ± {row[f'{key}_standard_error']:.3f}" for key in ("before", "after", "difference")]
    return f"  {name:24}{cells[0]}  →  {cells[1]}   change {cells[2]}{_ratio(row)}"


def _colors_line(entropy: float | Mapping[str, Any]) -> str:
    name = f"  {'entropy of open colors':24}"
    if isinstance(entropy, Mapping):
        return f"{name}{entropy['before']:.2f}  →  {entropy['after']:.2f} bits{_ratio(entropy)}"
    return f"{name}{entropy:.2f} bits"


def _ratio(row: Mapping[str, Any]) -> str:
    return f"   ratio {row['ratio']:.2f}" if row.get("ratio") is not None else ""


def score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format one line per image, {"image", "scores"}, and the mean of several images."""
    words = list(rows[0]["scores"])
    width = max(len("mean"), *(len(row["image"]) for row in rows))
    lines = [f"{'image':{width}}  " + "  ".join(f"{word:>12}" for word in words)]
    for row in rows:
        lines.append(f"{row['image']:{width}}  " + "  ".join(_score_cell(row["scores"][w], w) for w in words))
    if len(rows) > 1:
        known = {w: [v for row in rows if (v := row["scores"][w]) is not None] for w in words}
        means = {w: sum(values) / len(values) if values else None for w, values in known.items()}
        lines.append(f"{'mean':{width}}  " + "  ".join(_score_cell(means[w], w) for w in words))
    return "\n".join(lines)


def _score_cell(value: float | None, word: str) -> str:
    text = "no number" if value is None else f"{value:.4f}"
    return f"{text:>{max(12, len(word))}}"


def catalog_table(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format one block per kind, one line per entry."""
    width = 2 + max(len(entry["name"]) for entries in table.values() for entry in entries)
    blocks = [f"{kind}\n" + "\n".join(f"  {e['name']:{width}}{e['text']}" for e in table[kind]) for kind in table]
    return "\n\n".join(blocks)


def rewards_table(rewards: Sequence[Mapping[str, Any]]) -> str:
    """Format one block per reward; its facts are sentences and too long for columns."""
    blocks = []
    for each in rewards:
        use = "training and evaluation" if each["differentiable"] else "evaluation only (no gradient)"
        lines = [f"{each['name']}: {each['text']}", f"  {'for':9}{use}"]
        lines += [f"  {word:9}{each[fact]}" for fact, word in REWARD_FACTS.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def print_checks(answer: Mapping[str, Any]) -> None:
    """Format one line for each check of `leapalign verify`, then the verdict."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{answer['kind']} {answer['source']}"
    table = Table("", "part", "check", "came", "expected", "what to do", title=title, box=SIMPLE)
    for check in answer["checks"]:
        cells = (check[name] for name in ("part", "check", "came", "expected", "remedy"))
        table.add_row(MARKS[check["state"]], *(escape(cell) for cell in cells))
    console = Console() if sys.stdout.isatty() else Console(width=160)  # a log has no width
    console.print(table)
    console.print(_verdict([check["state"] for check in answer["checks"]]))


def _verdict(states: Sequence[str]) -> str:
    word = "NOT as it should be" if "different" in states else "good"
    count = {state: states.count(state) for state in MARKS}
    return f"{word}: {count['good']} checks agree, {count['different']} differ, {count['note']} notes"


def print_study(summary: Mapping[str, Any], caption: str) -> None:
    """Format before, after and paired change of a study's summary.json, and the paths of its results."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['steps']} steps, {summary['seconds']:.0f} s; ± one standard error")
    for name in ("", "before", "after", "change (paired)"):
        table.add_column(name, justify="left" if not name else "right")
    geneval = summary["geneval"]
    for tag, row in (geneval["per_task"] if geneval else {}).items():
        table.add_row(TASK_NAMES.get(tag, tag), *_study_cells(row))
    if geneval:
        table.add_row("GenEval overall", *_study_cells(geneval), style="bold", end_section=True)
    table.add_row("reward", *_study_cells(summary["reward"]))
    table.add_row("held-out reward", *_study_cells(summary["held_out_reward"]), end_section=True)
    for space, row in summary["diversity"].items():
        table.add_row(f"distance within a prompt, {space}", *_ratio_cells(row))
    if summary["open_colors"]:
        table.add_row("entropy of open colors, bits", *_ratio_cells(summary["open_colors"]["entropy"]))
    console = Console()
    console.print(table)
    console.print(caption, soft_wrap=True)


def _study_cells(row: Mapping[str, Any]) -> list[str]:
    names = (("before", ".3f"), ("after", ".3f"), ("difference", "+.3f"))
    return [f"{row[name]:{form}} ± {row[f'{name}_standard_error']:.3f}" for name, form in names]


def _ratio_cells(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['before']:.3f}", f"{row['after']:.3f}", "" if row["ratio"] is None else f"× {row['ratio']:.2f}"]

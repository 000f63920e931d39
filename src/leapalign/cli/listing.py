"""`leapalign list`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """What there is to choose from, with the class that a run.json names."""

    kind: Annotated[
        Literal["all", "methods", "models", "rewards", "prompts", "tuning", "recipes"], tyro.conf.Positional
    ] = "all"
    json: bool = False
    """Print JSON on stdout."""


def list_command(argv: list[str]) -> None:
    flags = tyro.cli(ListFlags, args=argv, prog="leapalign list")
    from leapalign.lookup.catalog import KINDS, listing, rewards_table

    table = listing(KINDS if flags.kind == "all" else (flags.kind,))
    width = 2 + max(len(entry["name"]) for entries in table.values() for entry in entries)
    lines = [f"{kind}\n" + "\n".join(f"  {e['name']:{width}}{e['text']}" for e in table[kind]) for kind in table]
    answer(table, flags.json, "\n\n".join(lines) if flags.kind != "rewards" else rewards_table(table["rewards"]))

"""`leapalign list`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """List what a run can use, with the class names for run.json."""

    kind: Annotated[
        Literal["all", "methods", "models", "rewards", "prompts", "tuning", "recipes"], tyro.conf.Positional
    ] = "all"
    json: bool = False
    """Print JSON on stdout."""


def list_command(argv: list[str]) -> None:
    flags = tyro.cli(ListFlags, args=argv, prog="leapalign list")
    from leapalign.lookup.catalog import KINDS, listing
    from leapalign.report.tables import catalog_table, rewards_table

    table = listing(KINDS if flags.kind == "all" else (flags.kind,))
    answer(table, flags.json, rewards_table(table["rewards"]) if flags.kind == "rewards" else catalog_table(table))

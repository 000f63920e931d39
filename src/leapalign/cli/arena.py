"""`leapalign arena`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import UserError

if TYPE_CHECKING:
    from leapalign.studies.arena.table import Tables

PART = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")


@dataclass(frozen=True, kw_only=True)
class ArenaFlags:
    """Methods × seeds on one base, reward and evaluation, at equal updates and at equal compute. Resumable."""

    study: Annotated[str, tyro.conf.Positional]
    """arena, arena-smoke, ablations, ablations-guided, experts, file.py:name (which is executed), or a study.json."""
    out: str = ""
    """The study's folder; empty = the study's own. Finished runs in it are kept, an interrupted one is resumed."""
    seeds: tuple[int, ...] = ()
    """Seeds of the table; empty = the study's own."""
    search: bool = False
    """Search learning rates and own settings on validation prompts, for later runs of the study in this folder."""
    part: str = "1/1"
    """I/N: the I-th of N processes that share the work; start all of them with the same flags."""
    json: bool = False
    """Print the tables as JSON on stdout."""


def arena_command(argv: list[str]) -> None:
    flags = tyro.cli(ArenaFlags, args=argv, prog="leapalign arena")
    part = _part(flags.part)
    from leapalign.studies.arena.conduct import conduct, conduct_search, load_study, with_seeds

    study = with_seeds(load_study(flags.study), flags.out, flags.seeds)
    if flags.search:
        conduct_search(study, part=part)
        answer({"out": study.out}, flags.json, f"{study.out}/search has the settings that were found")
        return
    _show(conduct(study, part=part, command=f"leapalign arena {' '.join(argv)}"), flags.json, study.out)


def _show(found: Tables, as_json: bool, out: str) -> None:
    from leapalign.report.comparison import as_json as values
    from leapalign.report.formats import print_comparison

    each = found.by_name
    if as_json:
        answer({name: values(table) for name, table in each.items()}, True, "")
        return
    for table in each.values():
        print_comparison(table)
    print(f"{out}/arena.html has the page")


def _part(word: str) -> tuple[int, int]:
    found = PART.fullmatch(word)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"--part {word}: expected I/N with I from 1 to N, as in 1/2 and 2/2")
    return int(found[1]), int(found[2])

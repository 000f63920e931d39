"""Conduct a study: count what an update costs, train and evaluate every run, make the tables and the page.

Every part is kept as soon as it is finished. The same command goes on after a kill, and several processes may share the
work (`part`): each takes its share of the runs, and the last one makes the complete table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from leapalign.codec import loads, suggestion
from leapalign.errors import UserError
from leapalign.lookup.user_files import load_file, value_in
from leapalign.report.comparison import as_json
from leapalign.report.formats import comma_separated, latex, markdown
from leapalign.storage.atomic import disk_errors, write_text
from leapalign.studies.arena import work
from leapalign.studies.arena.ablations import ablations, ablations_guided
from leapalign.studies.arena.experts import experts
from leapalign.studies.arena.named import arena, arena_smoke
from leapalign.studies.arena.search import search
from leapalign.studies.arena.study import Study
from leapalign.studies.arena.table import Tables, page, tables

PAGE = "arena.html"
STUDIES: dict[str, Callable[[], Study]] = {
    "arena": arena,
    "arena-smoke": arena_smoke,
    "ablations": ablations,
    "ablations-guided": ablations_guided,
    "experts": experts,
}


def load_study(word: str) -> Study:
    """Return the study that STUDY names: a name, file.py:name (the file is executed), or a study.json."""
    if word.endswith(".json"):
        try:
            text = Path(word).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{word}: cannot read the study ({error})") from None
        return loads(text, Study, where=word)
    if ".py:" in word:
        file, _, name = word.rpartition(":")
        return value_in(load_file(file), name, word, Study, "a study is a function that returns an arena's Study")
    if word not in STUDIES:
        raise UserError(
            f"unknown study {word!r}{suggestion(word, STUDIES)}; STUDY is one of {', '.join(STUDIES)}, or "
            "file.py:name, or a study.json"
        )
    return STUDIES[word]()


def conduct(study: Study, *, part: tuple[int, int] = (1, 1), command: str = "") -> Tables:
    """Do this part of the study's runs; write and return the tables of all that is finished.

    `part` (i, n): every n-th run, beginning with the i-th. Raises UserError.
    """
    out = Path(study.out)
    with disk_errors(out, "make room; the same command goes on"):
        work.begin(study, out)
        searched = [c.name for c in study.contenders if (out / "search" / f"{c.name}.json").is_file()]
        study = work.settled(study, out)
        known = work.costs(study, out)
        updates = work.updates_of(study, known)
        judge = work.Judge(judging=study.judging, base=out / "base")
        for run in work.runs_of(study, out, updates)[part[0] - 1 :: part[1]]:
            work.finish(run)
            judge(run)
        found = tables(study, out, known, updates)
        _write(out, found, page(study, found, command, searched))
    return found


def conduct_search(study: Study, *, part: tuple[int, int] = (1, 1)) -> None:
    """Search the grid of this part of the contenders, those that are finished excepted. Raises UserError."""
    out = Path(study.out)
    with disk_errors(out, "make room; the same command goes on"):
        work.begin(study, out)
        for contender in study.contenders[part[0] - 1 :: part[1]]:
            if contender.grid and not (out / "search" / f"{contender.name}.json").is_file():
                search(study, out, contender)


def with_seeds(study: Study, out: str, seeds: tuple[int, ...]) -> Study:
    """Return the study with another folder and other seeds, where they are given."""
    return replace(study, out=out or study.out, seeds=seeds or study.seeds)


def _write(out: Path, found: Tables, html: str) -> None:
    """Write the tables and the page into the study's folder, replacing those of an earlier part."""
    each = found.by_name
    with work.alone(out):
        for name, table in each.items():
            for ending, form in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
                write_text(out / f"{name}.{ending}", form(table))
        record = {name: as_json(table) for name, table in each.items()}
        write_text(out / "arena.json", json.dumps(record, indent=2) + "\n")
        write_text(out / PAGE, html)

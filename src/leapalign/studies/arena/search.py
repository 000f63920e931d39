"""Search a contender's learning rate and own settings: every combination of its grid, on prompts and seeds of its own.

The score is the held-out reward, whose paired error is a third of that of GenEval's overall. The best value should lie
inside its axis: one at the edge widens the axis by the ratio of its last two values and the search goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from leapalign.report.comparison import mean_with_error
from leapalign.report.records import EVALUATION, EVALUATION_FILE, read_evaluation
from leapalign.run import Run
from leapalign.storage.atomic import write_text
from leapalign.studies.arena.study import Axis, Contender, Study, with_setting
from leapalign.studies.arena.work import Judge, finish, run_of, say
from leapalign.studies.before_after import HELD_OUT

Point = tuple[float, ...]  # a value of each axis


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search: the best point, those at whose edge it lies, and every score."""

    axes: Sequence[Axis]  # as widened
    best: Point
    edges: Sequence[str]  # settings whose best value is still at the edge
    scores: Mapping[Point, float]

    @property
    def record(self) -> dict[str, Any]:
        """What CONTENDER.json holds."""
        names = [axis.setting for axis in self.axes]
        tried = [{"settings": dict(zip(names, point)), "score": score} for point, score in self.scores.items()]
        return {"settings": dict(zip(names, self.best)), "at_edge": list(self.edges), "tried": tried}


def search(study: Study, out: Path, contender: Contender) -> None:
    """Search the contender's grid; write STUDY/search/CONTENDER.json. Runs that are there are not repeated."""
    place = out / "search"
    place.mkdir(exist_ok=True)
    judge = Judge(judging=study.search.judging, base=place / "base")

    def score(point: Point) -> float:
        run, words = contender.run, []
        for axis, value in zip(contender.grid, point):
            run = with_setting(run, axis.setting, value)
            words.append(f"{axis.setting.removeprefix('method.')}-{value:g}")
        folder = place / ("_".join(words) or "as-it-is")
        runs = [run_of(replace(contender, run=run), folder, study.steps, seed) for seed in study.search.seeds]
        value = mean_with_error([_score(judge, run) for run in runs]).value
        say(f"{contender.name} {' '.join(words)}: held-out reward {value:.4f}")
        return value

    found = widen(contender.grid, score, study.search.widenings, contender.name)
    write_text(place / f"{contender.name}.json", json.dumps(found.record, indent=2) + "\n")


def _score(judge: Judge, run: Run) -> float:
    finish(run)
    judge(run)
    return read_evaluation(Path(run.out) / EVALUATION / EVALUATION_FILE)[f"evaluated/reward/{HELD_OUT}"].value


def widen(grid: Sequence[Axis], score: Callable[[Point], float], widenings: int, name: str) -> Found:
    """Score every point; widen axes whose best value is at their edge, at most `widenings` times. Warns of edges."""
    axes, scores = list(grid), {}
    best: Point = ()
    edges: list[str] = []
    for left in range(widenings, -1, -1):
        for point in product(*(axis.values for axis in axes)):
            if point not in scores:
                scores[point] = score(point)
        best = max(scores, key=lambda point: scores[point])
        wider = [widened(axis, value) for axis, value in zip(axes, best)]
        edges = [axis.setting for axis, new in zip(axes, wider) if new != axis]
        if not edges:
            break
        say(f"{name}: the best value of {', '.join(edges)} is at the grid's edge" + ("; widening" if left else ""))
        if left:
            axes = wider
    return Found(axes=axes, best=best, edges=edges, scores=scores)


def widened(axis: Axis, best: float) -> Axis:
    """Return the axis with one more value beyond `best`, if that is its first or last and its bounds allow one."""
    values = axis.values
    if len(values) < 2 or best not in (values[0], values[-1]):
        return axis
    low = best == values[0]
    edge, inner = (values[0], values[1]) if low else (values[-1], values[-2])
    new = edge * edge / inner if min(edge, inner) > 0 else 2 * edge - inner
    new = min(max(new, axis.least), axis.most)
    if all(value == int(value) for value in values):  # a setting of whole numbers
        new = round(new)
    if new in values:
        return axis
    return replace(axis, values=(new, *values) if low else (*values, new))

"""Search a contender's learning rate and own settings, on prompts and seeds of the search's own.

The score is the held-out reward, whose paired error is a third of that of GenEval's overall. One axis is searched after
another, the others at the best values so far, until no axis moves: two thirds of the runs of all combinations. The best
value should lie inside its axis: one at the edge widens the axis by the ratio of its last two values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leapalign.report.comparison import mean_with_error
from leapalign.report.records import EVALUATION, EVALUATION_FILE, read_evaluation
from leapalign.run import Run
from leapalign.storage.atomic import write_text
from leapalign.studies.arena.study import Axis, Contender, Study, setting_of, with_setting
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

    found = climb(contender, score, study.search.widenings)
    write_text(place / f"{contender.name}.json", json.dumps(found.record, indent=2) + "\n")


def _score(judge: Judge, run: Run) -> float:
    finish(run)
    judge(run)
    return read_evaluation(Path(run.out) / EVALUATION / EVALUATION_FILE)[f"evaluated/reward/{HELD_OUT}"].value


def climb(contender: Contender, score: Callable[[Point], float], widenings: int) -> Found:
    """Search one axis after another from the contender's own values, until no axis moves. Warns of edges.

    An axis is widened at most `widenings` times. A value that the grid lacks begins at the grid's middle.
    """
    ascent = _Ascent(axes=list(contender.grid), score=score, left=[widenings] * len(contender.grid))
    point = tuple(_start(axis, setting_of(contender.run, axis.setting)) for axis in contender.grid)
    moved = True
    while moved:
        before = point
        for place in range(len(ascent.axes)):
            point = ascent.along(point, place, contender.name)
        moved = point != before
    edges = [axis.setting for axis, value in zip(ascent.axes, point) if widened(axis, value) != axis]
    return Found(axes=ascent.axes, best=point, edges=edges, scores=ascent.scores)


@dataclass(frozen=True, kw_only=True)
class _Ascent:
    """A search that runs: its axes and widenings left, which change, and every score."""

    axes: list[Axis]
    score: Callable[[Point], float]
    left: list[int]
    scores: dict[Point, float] = field(default_factory=dict)

    def along(self, point: Point, place: int, name: str) -> Point:
        """Return the best point along one axis, widened while its best value is at its edge."""
        while True:
            axis = self.axes[place]
            points = [(*point[:place], value, *point[place + 1 :]) for value in axis.values]
            best = max((point, *points), key=self._score)  # the present one where scores are equal
            wider = widened(axis, best[place])
            if wider == axis:
                return best
            left = self.left[place]
            say(f"{name}: the best {axis.setting} is at the grid's edge" + ("; widening" if left else ""))
            if not left:
                return best
            self.axes[place], self.left[place] = wider, left - 1
            point = best

    def _score(self, point: Point) -> float:
        if point not in self.scores:
            self.scores[point] = self.score(point)
        return self.scores[point]


def _start(axis: Axis, own: float) -> float:
    return own if own in axis.values else axis.values[len(axis.values) // 2]


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

"""The arena's tables and page: means over seeds ± their standard errors, against the base and against the reference.

All seeds are judged over the same prompts and noise as the base, which no seed touches. So a contender's difference to
the base has the error of its mean, and its difference to the reference is paired seed by seed: both had the same
prompts and noise in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from leapalign.evaluation.statistics import EVALUATION_FILE
from leapalign.report.comparison import COLUMNS, Column, Comparison, Number, Row, columns_of, mean_with_error
from leapalign.report.comparison_page import ComparisonPage, Scatter, render_comparison
from leapalign.report.figures import Point
from leapalign.report.records import read_evaluation, read_row
from leapalign.studies.arena.cost import Cost
from leapalign.studies.arena.study import Contender, Study
from leapalign.studies.arena.work import run_of
from leapalign.studies.before_after import HELD_OUT, REWARD, facts

EQUAL = ("equal updates", "equal compute")
OVERALL = "geneval/overall"
HELD = f"evaluated/reward/{HELD_OUT}"
DIVERSITY = ("evaluated/open_color_entropy", "evaluated/diversity/pixels")
CHANGED = (OVERALL, HELD)  # numbers whose differences are shown
TABLE = (
    Column(key="runs", title="seeds", form=".0f"),
    Column(key="steps", title="updates", form=".0f"),
    Column(key="compute", title="TFLOP", form=".3g"),
    Column(key="minutes", title="minutes", better="lower", form=".3g"),
    Column(key="clipped", title="updates clipped", form=".2f"),
    Column(key="reward", title="training reward", better="higher"),
    Column(key=f"evaluated/reward/{REWARD}", title="reward, evaluated", better="higher"),
    Column(key=HELD, title="held out", better="higher"),
    Column(key=f"change/{HELD}", title="held out, against the base", form="+.3f"),
    Column(key=f"against/{HELD}", title="held out, against REFERENCE", form="+.3f"),
    *(column for column in COLUMNS if column.key.startswith("geneval/") and column.key != "geneval/"),
    Column(key=f"change/{OVERALL}", title="overall, against the base", form="+.3f"),
    Column(key=f"against/{OVERALL}", title="overall, against REFERENCE", form="+.3f"),
    Column(key="evaluated/open_color_entropy", title="open colours, bits", better="higher"),
    Column(key="evaluated/diversity/pixels", title="distance, pixels", better="higher"),
    Column(key="drift", title="drift", form=".3g"),
)
COSTS = (
    Column(key="forwards", title="forwards a sample", form=".1f"),
    Column(key="backwards", title="backwards a sample", form=".1f"),
    Column(key="generator_forward", title="generator, forward, GFLOP", form=".3g"),
    Column(key="generator_backward", title="generator, backward, GFLOP", form=".3g"),
    Column(key="scoring", title="decode and rewards, GFLOP", form=".3g"),
    Column(key="total", title="an update, GFLOP", better="lower", form=".3g"),
    Column(key="seconds", title="seconds an update", better="lower", form=".2f"),
    Column(key="steps", title="updates at equal compute", form=".0f"),
)
NOTE = (
    "Mean over seeds ± standard error over seeds; one seed has none. All rows are judged over the same prompts and "
    "noise. Against the base: the same error, for the base is one model. Against {reference}: paired seed by seed."
)
COST_NOTE = (
    "Operations of one update of {batch} samples, by torch's counter, averaged over the updates counted; a backward "
    "counts as two forwards. Seconds: median of the runs' updates. Evaluations are left out."
)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is finished of a study."""

    equal_updates: Comparison
    equal_compute: Comparison | None  # None for a study without it
    costs: Comparison

    @property
    def by_name(self) -> dict[str, Comparison]:
        """Names of the files -> tables."""
        named = {"updates": self.equal_updates, "compute": self.equal_compute, "costs": self.costs}
        return {name: table for name, table in named.items() if table is not None}


def tables(study: Study, out: Path, known: Mapping[str, Cost], updates: Mapping[str, tuple[int, int]]) -> Tables:
    """Make the tables of the runs that are finished and evaluated."""
    base = read_evaluation(out / "base" / EVALUATION_FILE) if (out / "base" / EVALUATION_FILE).is_file() else {}
    both = []
    for index, words in enumerate(EQUAL[: 1 + study.equal_compute]):
        found = {c.name: _read(study, c, out, updates[c.name][index]) for c in study.contenders}
        rows = [
            _row(c.name, found[c.name], base, found[study.reference], known[c.name].total)
            for c in study.contenders
            if found[c.name]
        ]
        rows = [Row(name="base", numbers=base), *rows] if base else rows
        titled = [replace(c, title=c.title.replace("REFERENCE", study.reference)) for c in TABLE]
        note = NOTE.format(reference=study.reference)
        title = f"{study.name}: {words}" if index else study.name
        both.append(Comparison(title=title, rows=rows, columns=columns_of(rows, titled), note=note))
    compute = both[1] if study.equal_compute else None
    return Tables(equal_updates=both[0], equal_compute=compute, costs=_costs(study, out, known, updates))


def _read(study: Study, contender: Contender, out: Path, steps: int) -> dict[int, Row]:
    """Return seed -> row, of the runs that are evaluated."""
    found = {}
    for seed in study.seeds:
        place = Path(run_of(contender, out, steps, seed).out)
        if (place / "evaluation" / EVALUATION_FILE).is_file():
            found[seed] = read_row(place)
    return found


def _row(
    name: str, runs: Mapping[int, Row], base: Mapping[str, Number], reference: Mapping[int, Row], operations: float
) -> Row:
    """Average a contender's runs over its seeds."""
    each = list(runs.values())
    keys = [key for key in each[0].numbers if all(key in row.numbers for row in each)]
    numbers = {key: mean_with_error([row.numbers[key].value for row in each]) for key in keys}
    for key in CHANGED:
        if key in base and key in numbers:
            numbers[f"change/{key}"] = Number(numbers[key].value - base[key].value, numbers[key].error)
        if reference is not runs and (pairs := differences_by_seed(runs, reference, key)):
            numbers[f"against/{key}"] = mean_with_error(pairs)
    steps = numbers["steps"].value
    numbers |= {"runs": Number(len(each)), "compute": Number(steps * operations / 1e12), "steps": Number(steps)}
    if "seconds" in numbers:
        numbers["minutes"] = Number(steps * numbers["seconds"].value / 60)
    return Row(name=name, numbers=numbers, curves=_mean_curves(each), settings=each[0].settings)


def differences_by_seed(runs: Mapping[int, Row], reference: Mapping[int, Row], key: str) -> list[float]:
    """Return run - reference for each seed that both have."""
    both = [seed for seed in runs if seed in reference]
    pairs = [(runs[seed].numbers, reference[seed].numbers) for seed in both]
    return [own[key].value - other[key].value for own, other in pairs if key in own and key in other]


def _mean_curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Average each metric over the seeds, at the updates that all of them have."""
    found = {}
    for metric in rows[0].curves:
        curves = [dict(row.curves.get(metric, ())) for row in rows]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        found[metric] = [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
    return found


def _costs(study: Study, out: Path, known: Mapping[str, Cost], updates: Mapping[str, tuple[int, int]]) -> Comparison:
    rows = []
    for contender in study.contenders:
        cost = known[contender.name]
        values = {"forwards": cost.forwards, "backwards": cost.backwards}
        values |= {"steps": updates[contender.name][1]} if study.equal_compute else {}
        operations = {
            "generator_forward": cost.generator_forward,
            "generator_backward": cost.generator_backward,
            "scoring": cost.scoring,
            "total": cost.total,
        }
        numbers = {key: Number(float(value)) for key, value in values.items()}
        numbers |= {key: Number(value / 1e9) for key, value in operations.items()}
        seconds = [
            row.numbers["seconds"].value
            for steps in dict.fromkeys(updates[contender.name])
            for row in _read(study, contender, out, steps).values()
            if "seconds" in row.numbers
        ]
        numbers |= {"seconds": Number(median(seconds))} if seconds else {}
        rows.append(Row(name=contender.name, numbers=numbers))
    note = COST_NOTE.format(batch=study.contenders[0].run.batch_size)
    title = "What an update costs"
    return Comparison(title=title, rows=rows, columns=columns_of(rows, COSTS), note=note)


def page(study: Study, found: Tables, command: str, searched: Sequence[str]) -> str:
    """Render the study's page."""
    lead = (
        f"{len(study.contenders)} methods, seeds {', '.join(str(seed) for seed in study.seeds)}, batches of "
        f"{study.contenders[0].run.batch_size}, on one base, reward, training prompts and evaluation. "
        + (f"First at equal updates, then at the compute of {study.reference}. " if study.equal_compute else "")
        + "Curves are means over the seeds at equal updates."
    )
    compute = {key: value for key, value in facts({}).items() if key != "Time"}
    return render_comparison(
        ComparisonPage(
            comparison=found.equal_updates,
            others=tuple(table for name, table in found.by_name.items() if name != "updates"),
            lead=lead,
            scatters=[_scatter(found, key) for key in DIVERSITY if _points(found, key)],
            facts={"Settings searched": ", ".join(searched) or "none: the study's own", **compute},
            commands=(command,),
        )
    )


def _scatter(found: Tables, diversity: str) -> Scatter:
    words = next(column.title for column in TABLE if column.key == diversity)
    title = f"GenEval overall against {words}"
    title += "; filled: equal updates, rings: equal compute" if found.equal_compute else ""
    return Scatter(title=title, points=_points(found, diversity), x=words, y="GenEval overall")


def _points(found: Tables, diversity: str) -> list[Point]:
    """Return the points of both comparisons; runs that serve both are drawn once."""
    points = []
    both = (found.equal_updates, *([found.equal_compute] if found.equal_compute else []))
    for hollow, comparison in enumerate(both):
        for series, row in enumerate(found.equal_updates.rows):
            same = next((r for r in comparison.rows if r.name == row.name), None)
            if same is None or (hollow and same.numbers == row.numbers):
                continue
            x, y = same.numbers.get(diversity), same.numbers.get(OVERALL)
            if x is not None and y is not None:
                errors = {"x_error": x.error or 0.0, "y_error": y.error or 0.0}
                points.append(Point(name=row.name, series=series, x=x.value, y=y.value, hollow=bool(hollow), **errors))
    return points

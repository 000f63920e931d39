"""Train and evaluate the runs of a study: finished ones are kept, an interrupted one is resumed exactly.

STUDY/study.json                                     the study
STUDY/costs/CONTENDER.json                           what an update costs
STUDY/base/                                          images and numbers of the base
STUDY/runs/CONTENDER/N-updates/seed-S/               an ordinary run, with evaluation/evaluation.json
STUDY/search/CONTENDER.json                          the settings found, which the runs above then have
STUDY/search/base/, STUDY/search/runs/CONTENDER/...  the same for the search
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from leapalign.codec import decode, dumps, encode
from leapalign.errors import UserError
from leapalign.evaluation.diversity import diverse
from leapalign.evaluation.statistics import EVALUATION_FILE, Evaluation, compare, report
from leapalign.lookup.detectors import find_detector
from leapalign.report.records import EVALUATION, read_object
from leapalign.run import Run, differences, trajectory
from leapalign.storage.atomic import write_text
from leapalign.storage.lock import LOCK, is_empty
from leapalign.studies import before_after
from leapalign.studies.arena.cost import Cost, equal_compute, measure
from leapalign.studies.arena.study import Contender, Judging, Study, with_setting
from leapalign.training.loop import train

STUDY = "study.json"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Evaluates runs as `judging` says, over the same prompts and noise as the base, which is evaluated once."""

    judging: Judging
    base: Path  # folder of the base's images
    held: dict[str, Evaluation] = field(default_factory=dict)  # of the base, once it is needed

    def __call__(self, run: Run) -> None:
        """Evaluate a finished run, unless it was evaluated before; write RUN/evaluation/evaluation.json."""
        out = Path(run.out)
        if (out / EVALUATION / EVALUATION_FILE).is_file():
            return
        settings = self._settings(run)
        tuned = partial(run.tuning.load_tuned, run.model, str(out / run.tuning.output))
        after = before_after.evaluate_model(settings, tuned, str(out))
        before_after.write_evaluation(out, compare(self._base(settings), after))

    def _base(self, settings: before_after.Study) -> Evaluation:
        if not self.held:
            load = settings.run.model.load
            with alone(self.base):
                found = before_after.evaluate_model(settings, load, "the base", folder=self.base)
                write_text(self.base / EVALUATION_FILE, json.dumps(report(found), indent=2) + "\n")
            self.held["base"] = found
        return self.held["base"]

    def _settings(self, run: Run) -> before_after.Study:
        judging, model = self.judging, cast("Any", run.model)
        prompts = judging.prompts.load()
        return before_after.Study(
            run=run,
            held_out=judging.held_out.reward,
            prompts=prompts,
            detector=find_detector(prompts, model.height, model.width),
            diversity=diverse(prompts, judging.diversity_prompts, judging.images_per_prompt),
            command="leapalign arena",
            batch_size=judging.batch_size,
            evaluation_seed=judging.seed,
        )


def begin(study: Study, out: Path) -> None:
    """Make the study's folder, or check that it is this study's, which may have gained seeds or contenders.

    Raises UserError.
    """
    file, record = out / STUDY, encode(study)
    if file.is_file():
        old = read_object(file)
        if changes := differences(old, _without_additions(record, old)):
            raise UserError(f"{out} holds another study ({'; '.join(changes)}); give another --out")
    elif not is_empty(out):
        raise UserError(f"{out}: this folder is not empty and holds no study; give another --out")
    with alone(out):
        write_text(file, dumps(study))


def _without_additions(record: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return a study's JSON with the folder, and only the contenders and seeds, that the old one has too."""
    named = {contender["name"]: contender for contender in record["contenders"]}
    contenders, seeds = old.get("contenders"), old.get("seeds")
    if not isinstance(contenders, list) or not all(isinstance(c, dict) for c in contenders) or type(seeds) is not list:
        return record
    kept = [named.get(str(contender.get("name"))) for contender in contenders]
    return record | {"out": old.get("out"), "contenders": kept, "seeds": [s for s in seeds if s in record["seeds"]]}


def settled(study: Study, out: Path) -> Study:
    """Return the study with the settings that the search has found, for the contenders that it has finished."""
    contenders = []
    for contender in study.contenders:
        file, run = out / "search" / f"{contender.name}.json", contender.run
        found = read_object(file).get("settings") if file.is_file() else {}
        if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
            raise UserError(f"{file}: its settings are not numbers by name; delete it and search again")
        for setting, value in found.items():
            run = with_setting(run, setting, value)
        contenders.append(replace(contender, run=run))
    return replace(study, contenders=tuple(contenders))


def costs(study: Study, out: Path) -> dict[str, Cost]:
    """Return contender -> cost of an update, measured once and then read. Learning rates cost nothing."""
    with alone(out):
        return {contender.name: _cost(study, contender, out) for contender in study.contenders}


def _cost(study: Study, contender: Contender, out: Path) -> Cost:
    file, counted = out / "costs" / f"{contender.name}.json", _counted(contender)
    record = read_object(file) if file.is_file() else {}
    if record.get("run") != counted or "cost" not in record:
        say(f"counting the operations of {contender.name}")
        cost = measure(replace(contender.run, out=str(out)), study.counted_updates)
        record = {"run": counted, "cost": encode(cost)}
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(record, indent=2) + "\n")
    return decode(Cost, record["cost"], where=str(file))


def _counted(contender: Contender) -> dict[str, object]:
    free = {"learning_rate", "seed", "steps"}
    return {key: value for key, value in trajectory(encode(contender.run)).items() if key not in free}


def updates_of(study: Study, known: dict[str, Cost]) -> dict[str, tuple[int, int]]:
    """Return contender -> (updates at equal updates, updates at equal compute)."""
    if not study.equal_compute:
        return {c.name: (study.steps, study.steps) for c in study.contenders}
    reference = known[study.reference]
    return {
        c.name: (study.steps, equal_compute(study.steps, reference, known[c.name], c.run.updates_per_rollout))
        for c in study.contenders
    }


def run_of(contender: Contender, out: Path, steps: int, seed: int) -> Run:
    """Return one run of the study. `out`: the study's folder, or that of its search."""
    place = out / "runs" / contender.name / f"{steps}-updates" / f"seed-{seed}"
    return replace(contender.run, name=f"{contender.name}, seed {seed}", out=str(place), steps=steps, seed=seed)


def runs_of(study: Study, out: Path, updates: dict[str, tuple[int, int]]) -> list[Run]:
    """Return all runs, seed by seed, each once: equal updates and equal compute share a run where they agree."""
    return [
        run_of(contender, out, steps, seed)
        for seed in study.seeds
        for contender in study.contenders
        for steps in dict.fromkeys(updates[contender.name])
    ]


def finish(run: Run) -> None:
    """Train the run, or go on with it from its last checkpoint; nothing if it is finished. Raises UserError.

    A folder with another run's settings is refused.
    """
    out = Path(run.out)
    if (out / "run.json").is_file():
        changes = differences(trajectory(read_object(out / "run.json")), trajectory(encode(run)))
        if changes:
            raise UserError(
                f"{out} holds a run with other settings ({'; '.join(changes)}); remove it, or give another --out"
            )
    if not (out / "summary.json").is_file():
        say(f"training {out}")
        train(run, resume=not is_empty(out))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against other processes of the study while open."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)

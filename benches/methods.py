"""Methods on ShapeWorld: several seeds, equal updates and batch, GenEval and rewards, before and after, paired noise.

    python benches/methods.py > methods.json                   # the demo's recipe, three seeds
    python benches/methods.py --recipes shapeworld-leapalign shapeworld-refl --seeds 0 1 > methods.json
    python benches/methods.py --guidance 1 1.5 2 3 4 > guidance.json            # base and tuned, each at its best

Training, evaluation and tables are the demo's own (leapalign.studies.before_after). All seeds are evaluated over the
same prompts and noises, which no training seed touches; the base is therefore evaluated once. Standard errors:
`over_images` of one run's paired differences (their mean over the seeds, since the seeds share images), `over_seeds` of
the seeds' means.
With `--guidance`, base and tuned models are drawn at each scale over the same noises too, and each run is compared with
the base at the scale where its overall is highest, chosen on these very images: as trained (in the base's favour) and
at its own best scale (in no one's).
A finished run that lies under --out already is evaluated, not trained again.
Equal updates are not equal compute: ReFL and DRTune stop their rollouts early. `training_seconds` says what each cost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import tyro
from shared import facts, with_folders

from leapalign.codec import encode
from leapalign.errors import UserError
from leapalign.evaluation.statistics import Evaluation, compare, report
from leapalign.lookup.recipes import load_recipe, read_run
from leapalign.prompts import ShapeWorldPrompts
from leapalign.rewards.clip import PickScore
from leapalign.run import Run, differences, trajectory
from leapalign.shapeworld.detector import detect
from leapalign.studies.before_after import HELD_OUT, Study, evaluate_model, shapeworld_diversity, summarize
from leapalign.training.loop import train

CHANGES = {"overall": 0.20, "position": 0.15, "color_attr": 0.15}  # asked of the demo: means over the seeds
SINGLE_OBJECT = 0.95  # its accuracy, mean over the seeds
OPEN_COLORS, DIVERSITY = 0.90, 0.85  # least ratios of tuned to base, in each seed
HELD_OUT_SHARE = 2 / 3  # of what the training reward gains
EVALUATION_SEEDS = {"validation": 1000, "test": 0}
BEST_OVER_BEST = 0.05  # overall of tuned over base, each at its best guidance, in each seed


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Train and evaluate recipes over seeds; JSON on stdout, runs under --out."""

    recipes: tuple[str, ...] = ("shapeworld-leapalign",)
    seeds: tuple[int, ...] = (0, 1, 2)
    per_task: int = 300
    """Images a task, before and after."""
    split: Literal["validation", "test"] = "test"
    """Prompts; settings are chosen on validation prompts, with noises of their own, and reported on test prompts."""
    out: Path = Path("runs/methods")
    """New folder; a run each under it."""
    steps: int = 0
    """Updates; 0 = as in the recipes."""
    batch_size: int = 0
    """Samples an update; 0 = as in the recipes."""
    guidance: tuple[float, ...] = ()
    """Guidance scales at which base and tuned models are drawn as well."""
    generator: str = "embedded:generator"
    reward: str = "embedded:reward"
    judge: str = "embedded:judge"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Evaluations of models, each made once: recipes and seeds share their base."""

    known: dict[Any, Evaluation] = field(default_factory=dict)

    def at(self, study: Study, model: Any, scale: float) -> Evaluation:
        model = replace(model, guidance_scale=scale)
        key = (model, study.run.num_sampling_steps, study.run.rewards)
        if key not in self.known:
            self.known[key] = evaluate_model(study, model.load, f"{model.path} at guidance {scale}")
        return self.known[key]

    def best(self, study: Study, model: Any, scales: Sequence[float]) -> tuple[float, Evaluation]:
        """The scale at which the overall is highest, and the images there."""
        found = {scale: self.at(study, model, scale) for scale in scales}
        best = max(found, key=lambda scale: overall(found[scale]))
        return best, found[best]


def overall(evaluation: Evaluation) -> float:
    return report(evaluation)["geneval"]["overall"]["accuracy"]


def main(bench: Methods) -> dict[str, Any]:
    """recipe -> its runs and their mean; guidance scale -> the base's table."""
    drawn, recipes = Drawn(), {}
    base = study_of(bench, bench.recipes[0], bench.seeds[0])
    sweep = {str(scale): report(drawn.at(base, base.run.model, scale)) for scale in bench.guidance}
    for name in bench.recipes:
        runs = [one_run(bench, study_of(bench, name, seed), drawn) for seed in bench.seeds]
        table = averages(runs)
        recipes[name] = {"asked": asked(table, runs), "mean": table, "runs": runs}
        if bench.guidance:
            recipes[name]["at_best_guidance"] = best_guidance(runs)
    return {"split": bench.split, "recipes": recipes, "base_by_guidance": sweep} | facts(bench)


def one_run(bench: Methods, study: Study, drawn: Drawn) -> dict[str, Any]:
    """Train one recipe with one seed and compare it with the base."""
    run = study.run
    before = drawn.at(study, run.model, run.model.guidance_scale)
    summary = trained(run)
    tuned = replace(run.model, path=summary["pipeline"])
    after = drawn.at(study, tuned, run.model.guidance_scale)
    seconds = summary["seconds"]
    answer = {"seed": run.seed} | summarize(summary, compare(before, after), {"training": seconds}, seconds)
    if bench.guidance:
        scale, best = drawn.best(study, run.model, bench.guidance)
        own_scale, own_best = drawn.best(study, tuned, bench.guidance)
        answer["overall_by_guidance"] = {str(s): overall(drawn.at(study, tuned, s)) for s in bench.guidance}
        answer["against_best_guidance"] = {"scale": scale, **compare(best, after)}
        answer["best_against_best"] = {"scales": [scale, own_scale], **compare(best, own_best)}
    return answer


def trained(run: Run) -> dict[str, Any]:
    """The run's summary.json; of a finished one that is there already, if it is this very run."""
    done = Path(run.out) / "summary.json"
    if not done.is_file():
        print(f"training {run.name}", file=sys.stderr, flush=True)
        return train(run).summary
    if changes := differences(trajectory(encode(read_run(done.parent / "run.json", {}))), trajectory(encode(run))):
        raise UserError(f"{done.parent} is another run ({'; '.join(changes)}); give another --out")
    return json.loads(done.read_text()) | {"out": run.out, "pipeline": str(done.parent / "pipeline")}


def best_guidance(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: GenEval overall of the base at its best scale, the tuned models at the recipe's and at theirs."""
    rows = {
        key: [run[key]["geneval"]["overall"] for run in runs] for key in ("against_best_guidance", "best_against_best")
    }
    return {key: _average(row) for key, row in rows.items()}


def study_of(bench: Methods, recipe: str, seed: int) -> Study:
    """The recipe with the bench's numbers, between evaluations on ShapeWorld's test prompts."""
    run = with_folders(load_recipe(recipe, {}), bench.generator, bench.reward)
    batch = bench.batch_size or run.batch_size
    name, micro = f"{Path(recipe).name}-{seed}", min(batch, run.micro_batch_size)
    run = replace(run, steps=bench.steps or run.steps, batch_size=batch, micro_batch_size=micro, seed=seed)
    return Study(
        run=replace(run, name=name, out=str(bench.out / name), device=bench.device),
        held_out=PickScore(path=bench.judge),
        prompts=ShapeWorldPrompts(split=bench.split, num=bench.per_task).load(),
        detector=detect,
        diversity=shapeworld_diversity(bench.split),
        command="python benches/methods.py",
        evaluation_seed=EVALUATION_SEEDS[bench.split],
    )


def averages(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: before, after, change and its two standard errors."""
    rows = {"overall": [run["geneval"] for run in runs]}
    rows |= {task: [run["geneval"]["per_task"][task] for run in runs] for task in runs[0]["geneval"]["per_task"]}
    rows |= {name: [run[name] for run in runs] for name in ("reward", HELD_OUT)}
    table = {name: _average(row) for name, row in rows.items()}
    table["open_colors"] = _ratios([run["open_colors"]["entropy"] for run in runs])
    spaces = runs[0]["diversity"]
    table["diversity"] = {space: _ratios([run["diversity"][space] for run in runs]) for space in spaces}
    statistics = runs[0]["image_statistics"]
    table["image_statistics"] = {name: _average([run["image_statistics"][name] for run in runs]) for name in statistics}
    return table | {"training_seconds": mean(run["seconds_of"]["training"] for run in runs)}


def asked(table: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the demo is held to: the number asked, the number found, and whether it is reached."""
    rows = {name: (least, table[name]["difference"]) for name, least in CHANGES.items()}
    rows["single_object"] = (SINGLE_OBJECT, table["single_object"]["after"])
    rows["open_colors, least ratio"] = (OPEN_COLORS, min(table["open_colors"]["ratio"]))
    for space, found in table["diversity"].items():
        rows[f"diversity in {space}, least ratio"] = (DIVERSITY, min(found["ratio"]))
    gained = table["reward"]["difference"]
    rows["held-out reward"] = (HELD_OUT_SHARE * gained, table[HELD_OUT]["difference"])
    if all("best_against_best" in run for run in runs):
        least = min(run["best_against_best"]["geneval"]["overall"]["difference"] for run in runs)
        rows["best guidance over the base's best, least"] = (BEST_OVER_BEST, least)
    return {name: {"asked": least, "found": found, "reached": found >= least} for name, (least, found) in rows.items()}


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    changes = [row["difference"] for row in rows]
    found: dict[str, Any] = {key: mean(row[key] for row in rows) for key in ("before", "after", "difference")}
    found["over_images"] = mean(row["difference_standard_error"] for row in rows)
    found["over_seeds"] = stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
    return found


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of before and after, and every seed's ratio, of which the demo is held to the least."""
    return {key: mean(row[key] for row in rows) for key in ("before", "after")} | {"ratio": [r["ratio"] for r in rows]}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Methods)), indent=2))

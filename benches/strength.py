"""Score against variety over the strength of a finished ShapeWorld run: base + s (tuned - base), without training.

    python benches/strength.py runs/shapeworld-leapalign > strength.json     # and the figure strength.png

Every strength is evaluated on the same validation prompts and noises, and compared with strength 0, the base. Score:
GenEval's overall, the reward that the run trained on, and a held-out one. Variety: entropy of the open colours, and
mean pairwise distance of several images of one prompt. A strength chosen from this curve is chosen on validation
prompts; its numbers to report are those of `leapalign evaluate RUN --strength S`, on test prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from shared import facts

from leapalign.evaluation.diversity import CLIP_IMAGE, PIXELS, diverse
from leapalign.evaluation.statistics import Evaluation, compare
from leapalign.lookup.recipes import read_run
from leapalign.lookup.runs import check_run_folder
from leapalign.lookup.sources import find_source
from leapalign.prompts import ShapeWorldPrompts
from leapalign.rewards.clip import PickScore
from leapalign.shapeworld.detector import detect
from leapalign.studies.before_after import HELD_OUT, REWARD, Study, evaluate_model

SCORES = {"overall": "GenEval overall", REWARD: "reward", HELD_OUT: "held-out reward"}
VARIETY = {"entropy": "entropy of open colours", PIXELS: "distance within a prompt, pixels"}
VARIETY |= {CLIP_IMAGE: "distance within a prompt, held-out CLIP"}
COLORS = ("#1f5fa8", "#b8501f", "#3f8f4f")


@dataclass(frozen=True, kw_only=True)
class Strength:
    """Evaluate a run at several strengths; JSON on stdout and one figure."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run on ShapeWorld."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    """Besides 0, the base, which is always evaluated."""
    per_task: int = 60
    """Images a task at each strength."""
    same_prompt: int = 30
    """Prompts of which four images each are compared with each other."""
    seed: int = 0
    """Selects prompts and noises."""
    figure: Path = Path("strength.png")
    device: str = "cpu"


def main(bench: Strength) -> dict[str, Any]:
    """{"curve": a row of numbers at each strength, "comparisons": each with the base} and facts; writes the figure."""
    study = study_of(bench)
    base, *others = [at_strength(bench, study, s) for s in (0.0, *bench.strengths)]
    found = {0.0: compare(base, base)} | {s: compare(base, other) for s, other in zip(bench.strengths, others)}
    curve = [row(strength, comparison) for strength, comparison in sorted(found.items())]
    draw(curve, bench.figure)
    return {"curve": curve, "comparisons": {str(s): found[s] for s in sorted(found)}} | facts(bench)


def study_of(bench: Strength) -> Study:
    check_run_folder(bench.run)
    prompts = ShapeWorldPrompts(split="validation", num=bench.per_task, seed=bench.seed).load()
    return Study(
        run=replace(read_run(Path(bench.run) / "run.json", {}), device=bench.device),
        held_out=PickScore(path="embedded:judge"),
        prompts=prompts,
        detector=detect,
        diversity=diverse(prompts, bench.same_prompt),
        command="python benches/strength.py",
        evaluation_seed=bench.seed,
    )


def at_strength(bench: Strength, study: Study, strength: float) -> Evaluation:
    return evaluate_model(study, find_source(bench.run, {}, strength).load, f"{bench.run} at strength {strength:g}")


def row(strength: float, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers at one strength; `_change` is paired with the base, `_ratio` over the base."""
    scores = {"overall": comparison["geneval"]["overall"]} | comparison["rewards"]
    variety = {"entropy": comparison["open_colors"]["entropy"]} | comparison["diversity"]
    found: dict[str, Any] = {"strength": strength}
    for name, value in scores.items():
        found |= {name: value["after"], f"{name}_standard_error": value["after_standard_error"]}
        found |= {f"{name}_change": value["difference"], f"{name}_change_error": value["difference_standard_error"]}
    for name, value in variety.items():
        found |= {name: value["after"], f"{name}_ratio": value["ratio"]}
    return found


def draw(curve: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Three panels: scores over the strength, variety over the strength, scores against the entropy of open colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    scores, variety, both = figure.subplots(1, 3)
    strengths, entropy = ([point[name] for point in curve] for name in ("strength", "entropy_ratio"))
    for (name, label), color in zip(SCORES.items(), COLORS):
        values, errors = ([point[f"{name}{end}"] for point in curve] for end in ("", "_standard_error"))
        for panel, x in ((scores, strengths), (both, entropy)):
            panel.errorbar(x, values, yerr=errors, marker="o", markersize=4, capsize=2, color=color, label=label)
        for point, at in zip(curve, zip(entropy, values)):
            both.annotate(f"{point['strength']:g}", at, (5, 5), textcoords="offset points", color=color, size=8)
    for (name, label), style in zip(VARIETY.items(), ("o-", "s--", "^:")):
        variety.plot(strengths, [point[f"{name}_ratio"] for point in curve], style, color="#444444", label=label)
    for panel, x, y in (
        (scores, "strength (0 = base, 1 = as trained)", "score ± one standard error"),
        (variety, "strength", "variety, base = 1"),
        (both, "entropy of open colours, base = 1 (labels: strength)", "score ± one standard error"),
    ):
        panel.set(xlabel=x, ylabel=y)
        panel.margins(0.1)
        panel.grid(alpha=0.25)
    variety.set_ylim(bottom=0)
    scores.legend(frameon=False, fontsize=8)
    variety.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Strength)), indent=2))

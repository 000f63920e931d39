"""The bench of the paper's figures: differences paired by seed, verdicts, and a picture that opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leapalign.codec import dumps
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file as load_bench
from leapalign.studies.arena import work
from leapalign.studies.arena.ablations import ablations

BENCHES = Path(__file__).parents[2] / "benches"
REWARDS = {"leapalign": [0.6, 0.65, 0.61], "alpha-0": [0.5, 0.54, 0.52], "alpha-1": [0.7, 0.76, 0.70]}
REWARDS["lambda-0.5"] = [0.6, 0.6, 0.65]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_bench(str(BENCHES / "paper_figures.py"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A study's folder with four variants; the second seed of one of them is not evaluated yet."""
    study = ablations()
    folder = tmp_path / "ablations"
    folder.mkdir()
    (folder / "study.json").write_text(dumps(study))
    for name, rewards in REWARDS.items():
        for seed, reward in zip(study.seeds, rewards):
            run = work.run_of(study.contender(name), folder, study.steps, seed)
            place = Path(run.out)
            (place / "evaluation").mkdir(parents=True)
            (place / "run.json").write_text(dumps(replace(run, out=str(place))))
            lines = [{"step": step, "reward": reward, "grad_norm": 2.0 * step} for step in (1, 2, 120)]
            (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if (name, seed) != ("lambda-0.5", 1):
                record = {"rewards": {"reward": {"after": reward, "after_standard_error": 0.1}}}
                (place / "evaluation" / "evaluation.json").write_text(json.dumps(record))
    return folder


def test_a_statement_is_a_difference_paired_by_seed(bench, finished: Path, tmp_path: Path) -> None:
    settings = bench.PaperFigures(
        arena=tmp_path / "none", ablations=finished, guided=tmp_path / "none", out=tmp_path / "figure.png"
    )
    found = {(s["figure"], s["worse"]): s for s in bench.main(settings)["statements"]}
    assert found.keys() == {("4a", "alpha-0"), ("4a", "alpha-1"), ("T5", "lambda-0.5")}
    for worse, verdict in (("alpha-0", "agrees"), ("alpha-1", "departs")):
        pairs = np.array(REWARDS["leapalign"]) - np.array(REWARDS[worse])
        statement = found["4a", worse]
        assert statement["difference"] == pytest.approx(pairs.mean()) and statement["verdict"] == verdict
        assert statement["error"] == pytest.approx(pairs.std(ddof=1) / np.sqrt(3))
        assert statement["ours"][worse]["value"] == pytest.approx(np.mean(REWARDS[worse]))
    assert found["T5", "lambda-0.5"]["difference"] == pytest.approx(-0.02)  # of seeds 0 and 2
    assert found["T5", "lambda-0.5"]["verdict"] == "undecided"
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > image.height > 500


def test_every_statement_is_of_a_contender(bench) -> None:
    from leapalign.studies.arena.conduct import STUDIES

    studies = {"arena": "arena", "ablations": "ablations", "guided": "ablations-guided"}
    for statement in bench.STATEMENTS:
        names = {contender.name for contender in STUDIES[studies[statement.study]]().contenders}
        assert {statement.better, statement.worse} <= names


def test_nothing_finished_is_told(bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        bench.main(bench.PaperFigures(arena=tmp_path, ablations=tmp_path, guided=tmp_path, out=tmp_path / "x.png"))

"""GenEval's rules against 400 verdicts of the published evaluation with a stub detector: exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from leapalign.evaluation.statistics import overall, summary
from leapalign.geneval.rules import Detection, Rules, Verdict, judge

FOLDER = (
    Path(os.environ.get("LEAPALIGN_GOLDEN", Path(__file__).parents[2].parent / "shared/golden")) / "geneval_scoring"
)
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden files in {FOLDER}; set LEAPALIGN_GOLDEN")


def cases() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "cases.jsonl").read_text().splitlines()]


def verdict(case: dict) -> Verdict:
    found = [Detection(d["class"], d["color"], tuple(d["box"]), d["score"]) for d in case["detections"]]
    return judge(case["metadata"], found, Rules(**case["options"]))


def test_every_case() -> None:
    rows = cases()
    assert len(rows) == 400
    for case in rows:
        got, expected = verdict(case), case["expected"]
        assert got.correct == expected["correct"], case
        assert list(got.reasons) == expected["categories"], case
        assert got.kept == expected["kept"], case


def test_summary() -> None:
    rows = [case for case in cases() if not case["options"]]
    expected = json.loads((FOLDER / "summary.json").read_text())
    tasks = summary([case["tag"] for case in rows], [verdict(case).correct for case in rows])
    for tag, want in expected["tags"].items():
        assert (tasks[tag].correct, tasks[tag].num) == (want["correct"], want["n"])
        assert tasks[tag].accuracy == want["mean"]
    assert overall(tasks).accuracy == pytest.approx(expected["overall_mean_of_tags"], abs=1e-15)

"""Killed runs end as undisturbed ones: the bench's own functions with a few runs, and with more of them when slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.lookup.recipes import load_file

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_file(str(BENCHES / "kills.py"))


@pytest.mark.parametrize("runs", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_runs_end_in_the_same_weights_and_metrics(bench, tmp_path, runs):
    answer = bench.measure(bench.Kills(runs=runs, steps=12), tmp_path)
    assert answer["same"] and answer["runs"] == runs and answer["killed_runs"] >= runs - 1, answer


def test_the_bench_sees_other_weights_and_other_metrics(bench, tmp_path):
    whole = bench.Kills(steps=2, kills=0)
    for name, settings in (("a", whole), ("b", bench.Kills(steps=3, kills=0))):
        (tmp_path / "prompts.txt").write_text("red\n")
        bench._undisturbed(settings, tmp_path / name)
    first, second = (bench.last_state(tmp_path / name) for name in "ab")
    assert first[0] != second[0] and first[1] != second[1]

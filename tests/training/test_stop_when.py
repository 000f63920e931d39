"""A run that its rule ends: what is saved and exported, and that kills and resumptions change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leapalign.checkpoint import checkpoints
from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.monitors import Band, HeldOut, Monitors, StopWhen
from leapalign.training import loop
from leapalign.training.tracking import read_metrics


@pytest.fixture
def watched_run(tiny_run, tiny_module):
    """watched_run(**changes) -> a run whose held-out reward rises until step 12, and which ends after step 16."""
    monitors = Monitors(held_out=(HeldOut(reward=tiny_module.Toward(target=0.55)),))
    rule = StopWhen(evaluations=3)
    same = {"steps": 40, "evaluate_every": 1, "checkpoint_every": 5, "monitors": monitors, "stop_when": rule}
    return lambda **changes: tiny_run(**(same | changes))


def exported(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "pipeline" / "policy.safetensors")


def trace(out: str | Path) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(Path(out))]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_the_run_ends_and_exports_its_best_evaluation(watched_run, tmp_path, capsys) -> None:
    run = watched_run()
    summary = loop.train(run).summary
    values = [m["held_out/toward"] for m in trace(run.out)]
    best = values.index(max(values))
    assert summary["steps"] == len(values) - 1 == 16 and summary["exported"]["step"] == best == 12
    assert summary["exported"]["why"] == f"the highest held_out/toward ({max(values):.4g}) of 17 evaluations"
    assert summary["reward"]["after"] == trace(run.out)[best]["evaluation_reward"]
    said = capsys.readouterr().err
    assert summary["stopped"].startswith("stopped after step 16: held_out/toward has fallen from")
    assert f"{summary['stopped']}. Step 12 is exported; `leapalign resume {run.out} --no-stop-when` goes on" in said
    assert checkpoints.complete(run)[-1].name == "step-000016"
    assert json.loads((Path(run.out) / "summary.json").read_text()) == summary
    short = watched_run(out=str(tmp_path / "short"), steps=best, stop_when=StopWhen())
    assert loop.train(short).summary["exported"] == {"step": best, "why": "the last step"}
    assert same(exported(run.out), exported(short.out))


def test_a_run_that_reaches_its_last_step_exports_its_best_too(watched_run) -> None:
    summary = loop.train(watched_run(steps=14)).summary
    assert (summary["steps"], summary["stopped"], summary["exported"]["step"]) == (14, "", 12)


def test_resuming_an_ended_run_changes_nothing_and_no_stop_when_goes_on(watched_run, recipe_file, tmp_path, capsys):
    run = watched_run()
    loop.train(run)
    before, lines = exported(run.out), trace(run.out)
    resume = ["resume", run.out, "--plugin", str(recipe_file)]
    assert main(resume) == 0
    assert "(step 12: the highest held_out/toward" in capsys.readouterr().out
    assert same(exported(run.out), before) and trace(run.out) == lines
    assert main([*resume, "--no-stop-when", "--steps", "20"]) == 0
    whole = watched_run(out=str(tmp_path / "whole"), steps=20, stop_when=StopWhen())
    loop.train(whole)
    assert same(exported(run.out), exported(whole.out)) and trace(run.out) == trace(whole.out)


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [4, 7, 11, 13, 15])
def test_a_kill_at_any_step_changes_neither_end_nor_export(watched_run, tmp_path, moment) -> None:
    """Checkpoints are those of steps 5, 10, 15; the best weights change in every step up to 12."""

    def kill(metrics):
        if metrics["step"] == moment:
            raise Killed

    whole, run = watched_run(out=str(tmp_path / "whole")), watched_run()
    summary = loop.train(whole).summary
    with pytest.raises(Killed):
        loop.train(run, on_step=kill)
    again = loop.train(run, resume=True).summary
    timeless = ("name", "out", "pipeline", "seconds")
    assert {k: v for k, v in again.items() if k not in timeless} == {k: summary[k] for k in again if k not in timeless}
    assert same(exported(run.out), exported(whole.out)) and trace(run.out) == trace(whole.out)
    for out in (run.out, whole.out):  # step-000015 and step-000016 name step 12
        assert [p.name for p in Path(out, "checkpoints").glob("best-*")] == ["best-000012"]


def test_an_older_checkpoint_still_has_its_best_weights(watched_run, tmp_path) -> None:
    """From step 10, whose best was step 10, to step 11, which is better only by the training reward."""
    run = watched_run(keep_checkpoints=9)
    loop.train(run)
    rule = replace(run.stop_when, bands=(Band(monitor="held_out/toward", most=1.0),))  # nothing later is allowed
    again = replace(run, steps=11, stop_when=rule)
    assert loop.train(again, resume=True, checkpoint="step-000010").summary["exported"]["step"] == 10
    short = watched_run(out=str(tmp_path / "short"), steps=10, stop_when=StopWhen())
    loop.train(short)
    assert same(exported(run.out), exported(short.out))


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damaged_best_weights_are_told(watched_run, damage) -> None:
    run = watched_run()
    loop.train(run)
    file = Path(run.out) / "checkpoints" / "best-000012" / "weights.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"weights of the best evaluation are damaged or gone .*--no-stop-when` exports"
    ):
        loop.train(run, resume=True)
    assert loop.train(replace(run, stop_when=StopWhen()), resume=True).summary["exported"]["why"] == "the last step"


def test_without_the_rule_nothing_is_kept(watched_run) -> None:
    run = watched_run(steps=6, stop_when=StopWhen())
    loop.train(run)
    assert not list(Path(run.out, "checkpoints").glob("best-*"))
    state = json.loads((checkpoints.complete(run)[-1] / "state.json").read_text())
    assert (state["evaluations"], state["best_step"]) == ([], 0)


def test_without_evaluations_the_last_weights_are_exported(watched_run) -> None:
    summary = loop.train(watched_run(steps=2, evaluate_every=0)).summary
    assert (summary["exported"], summary["stopped"]) == ({"step": 2, "why": "the last step"}, "")


def test_a_checkpoint_from_before_the_rule_resumes(watched_run) -> None:
    """The first evaluation after it becomes the base of comparison."""
    run = watched_run(steps=5, stop_when=StopWhen())
    loop.train(run)
    summary = loop.train(replace(run, steps=40, stop_when=StopWhen(evaluations=3)), resume=True).summary
    assert summary["exported"]["step"] == 12 and summary["steps"] == 16

"""Batches of NaN that are left out and counted, within a limit, and the same after a resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leapalign.checkpoint import checkpoints
from leapalign.errors import RunStopped
from leapalign.run import RewardTerm
from leapalign.training import batches, direct, loop
from leapalign.training.tracking import read_metrics


@pytest.fixture
def spoiled(tiny_run, tiny_module):
    """spoiled(**changes) -> a run of one sample a batch, in which every batch of the prompt 'red' is bad."""
    reward = RewardTerm(reward=tiny_module.TinyReward(spoil="red"), threshold=2.0)
    small = {"batch_size": 1, "micro_batch_size": 1, "steps": 12, "checkpoint_every": 4, "evaluate_every": 0}
    return lambda **changes: tiny_run(**{"rewards": (reward,), "self_checks": False} | small | changes)


def bad_steps(run) -> list[int]:
    prompts = run.prompts.load()
    of = [next(batches.micro_batches(run, prompts, step)).prompts for step in range(run.steps)]
    return [step + 1 for step, (text,) in enumerate(of) if text == "red"]


def test_nonfinite_batches_are_left_out_and_counted(spoiled, capsys):
    run = spoiled(max_nonfinite_batches=9, learning_rate=1.0, weight_decay=0.9)
    steps = bad_steps(run)
    assert len(steps) >= 2
    seen = {}

    result = loop.train(run, on_step=lambda m: seen.__setitem__(m["step"], m))
    lines = {m["step"]: m for m in read_metrics(Path(run.out))}
    assert [step for step, m in lines.items() if m.get("nonfinite_batch")] == steps
    assert all(lines[s]["skipped"] == 1 and "reward" not in lines[s] for s in steps)
    assert result.summary["nonfinite_batches"] == result.summary["skipped"] == len(steps)
    assert "This batch was left out: 2 of at most 9" in capsys.readouterr().err


def test_a_batch_that_is_left_out_changes_nothing(spoiled):
    run = spoiled(max_nonfinite_batches=9)
    first = bad_steps(run)[0]
    engine = loop.build(run)
    for step in range(first - 1):
        direct.update(engine, step)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    shadow = {name: value.clone() for name, value in engine.ema.shadow.items()}
    with pytest.raises(RunStopped):
        direct.update(engine, first - 1)
    assert all((p == before[name]).all() for name, p in engine.parameters.items())
    assert all((value == shadow[name]).all() for name, value in engine.ema.shadow.items())


def test_the_limit_holds_over_a_resumption(spoiled, tmp_path):
    run = spoiled(max_nonfinite_batches=1)
    steps = bad_steps(run)
    for attempt in range(3):  # as often as it is tried: the first bad one is counted, the second stops the run
        with pytest.raises(
            RunStopped, match=rf"^step {steps[1]}: .*max_nonfinite_batches is 1; 1 were left out before"
        ):
            loop.train(run, resume=attempt > 0)
    more = replace(run, max_nonfinite_batches=9)
    loop.train(more, resume=True)
    whole = replace(more, out=str(tmp_path / "whole"))
    loop.train(whole)
    states = [checkpoints.find(each).state for each in (more, whole)]
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert states[0]["files"][name] == states[1]["files"][name]
    assert states[0]["nonfinite_batches"] == states[1]["nonfinite_batches"] == len(steps)
    assert [m["step"] for m in read_metrics(Path(run.out))] == list(range(1, 13))

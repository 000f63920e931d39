"""Samples above the threshold left out of the differentiated forwards: the same gradient, from fewer rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leapalign.errors import UserError
from leapalign.methods import FlowBPSparse, LeapAlign, ReFL
from leapalign.run import RewardTerm
from leapalign.training import direct, loop
from leapalign.training.tracking import read_metrics

METHODS = {
    "one shared pair": LeapAlign(),
    "pairs": LeapAlign(nested_scale=0.7, pairs_per_rollout=2, step_draws="stratified"),
    "sparse": FlowBPSparse(),
}


def run_of(tiny_run, tiny_module, threshold: float, **changes):
    """A run in float64 with eight samples at a time, whose reward's threshold some of them reach."""
    term = RewardTerm(reward=tiny_module.TinyReward(), threshold=threshold)
    same = {"model": tiny_module.TinyModel(double=True), "batch_size": 8, "micro_batch_size": 8, "rewards": (term,)}
    return tiny_run(**(same | changes))


def threshold_between(tiny_run, tiny_module, tmp_path) -> float:
    """The median of the rewards of the first batch."""
    engine = loop.build(run_of(tiny_run, tiny_module, 1e6, out=str(tmp_path / "median")))
    (micro,) = engine.micro_batches(0)
    surrogate, *_ = direct.roll_out(engine, micro, engine.velocity(micro.prompts))
    return float(direct.gradient_at_latent(engine, micro, surrogate).reward.median())


def gradients(run) -> dict[str, torch.Tensor]:
    """.grad after the first micro-batch, without clipping and step."""
    engine = loop.build(run)
    (micro,) = engine.micro_batches(0)
    direct.train(engine, direct.scored(engine, micro))
    return {name: p.grad.clone() for name, p in engine.parameters.items()}


REPLAYED = {"one shared pair": 2, "pairs": 2 * 2, "sparse": 3}  # differentiated forwards


@pytest.mark.parametrize("name", REPLAYED)
def test_the_gradient_is_the_same_and_fewer_rows_are_run(tiny_run, tiny_module, tmp_path, name, monkeypatch):
    method = METHODS[name]
    threshold = threshold_between(tiny_run, tiny_module, tmp_path)
    rows: list[int] = []
    encode = tiny_module.Tiny.encode
    monkeypatch.setattr(tiny_module.Tiny, "encode", lambda self, texts: rows.append(len(texts)) or encode(self, texts))
    found = {}
    for skip in (False, True):
        run = run_of(
            tiny_run, tiny_module, threshold, method=method, skip_satisfied=skip, out=str(tmp_path / str(skip))
        )
        rows.clear()
        found[skip] = gradients(run)
    assert set(rows) == {8, 3} and rows.count(3) == REPLAYED[name]
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-11, atol=1e-15)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("states", "rows"), [("all", {8}), ("first", {8, 3})])
def test_the_anchor_holds_the_satisfied_samples_too(tiny_run, tiny_module, tmp_path, states, rows, monkeypatch):
    threshold = threshold_between(tiny_run, tiny_module, tmp_path)
    same = {"method": METHODS["pairs"], "anchor_weight": 3.0, "anchor_states": states, "steps": 4}
    found, sizes = {}, set()
    encode = tiny_module.Tiny.encode
    for skip in (False, True):
        run = run_of(tiny_run, tiny_module, threshold, **same, skip_satisfied=skip, out=str(tmp_path / str(skip)))
        sizes.clear()
        engine = loop.build(run)
        monkeypatch.setattr(
            tiny_module.Tiny, "encode", lambda self, texts: sizes.add(len(texts)) or encode(self, texts)
        )
        found[skip] = [direct.update(engine, step) for step in range(3)], dict(engine.parameters)
    assert sizes >= rows and (len(rows) > 1 or sizes == rows)
    for name, p in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], p, rtol=1e-10, atol=1e-12)
    assert [row["anchor"] for row in found[True][0]] == pytest.approx([row["anchor"] for row in found[False][0]])


def test_a_batch_that_is_satisfied_takes_no_step(tiny_run, tiny_module):
    run = run_of(tiny_run, tiny_module, -1e6, method=METHODS["pairs"], skip_satisfied=True)
    result = loop.train(run)
    assert all(row["skipped"] for row in read_metrics(Path(result.out)) if row["step"])


def test_micro_batches_change_nothing(tiny_run, tiny_module, tmp_path):
    threshold = threshold_between(tiny_run, tiny_module, tmp_path)
    same = {"method": METHODS["pairs"], "skip_satisfied": True, "anchor_weight": 0.5, "updates_per_rollout": 2}
    same |= {"steps": 4, "checkpoint_every": 4}
    runs = [
        run_of(tiny_run, tiny_module, threshold, **same, micro_batch_size=m, out=str(tmp_path / str(m))) for m in (8, 2)
    ]
    whole, parts = (loop.train(run).engine.parameters for run in runs)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-12


def test_methods_that_cannot_are_refused(tiny_run, tiny_module):
    with pytest.raises(UserError, match="skip_satisfied: refl differentiates inside its rollout"):
        loop.build(run_of(tiny_run, tiny_module, 1.0, method=ReFL(), skip_satisfied=True))

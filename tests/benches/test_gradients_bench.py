"""The bench of gradients: full backpropagation against itself, sums over steps, counted compute."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file as load_bench
from leapalign.models.sd3 import SD3
from leapalign.training import direct
from leapalign.training.engine import build

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_bench(str(BENCHES / "gradients.py"))


def test_methods_against_full_backpropagation(bench) -> None:
    only = ("leapalign-a1-stratified", "draft-1")
    found = bench.main(bench.Gradients(only=only, batches=2, draws=2, batch_size=2, steps=3))["methods"]
    assert set(found) == {"full", *only}
    full, last = found["full"], found["draft-1"]
    assert (
        full["cosine"] == pytest.approx(1)
        and full["scale"] == pytest.approx(1)
        and full["efficiency"] == pytest.approx(1)
    )
    assert full["draw_noise"] == 0 and (full["forwards"], full["backwards"], full["compute"]) == (3, 3, 9)
    assert (last["forwards"], last["backwards"]) == (3, 1) and last["draw_noise"] == pytest.approx(0, abs=1e-3)
    early, _, late = last["steps"]
    assert (early["step"], early["norm"], early["cosine"]) == (3, 0, None)
    assert late["cosine"] == pytest.approx(1) and late["norm"] == pytest.approx(late["full_norm"], rel=1e-4)
    assert 0 < last["cosine"] < 1 and last["scale"] < 1
    assert last["efficiency"] == pytest.approx(last["update_cosine"] ** 2 * 9 / 5)
    sets = found["leapalign-a1-stratified"]
    assert (sets["forwards"], sets["backwards"]) == (5, 2)
    assert all(step["norm"] > 0 for step in sets["steps"])


def test_the_gradient_of_shared_weights_is_the_sum_over_the_steps(bench) -> None:
    """The copies are for measuring only: their gradients' sum is what one set of weights gets."""
    engine = bench.loaded(bench.Gradients(batches=2, draws=2, batch_size=2, steps=3))
    by_step = bench.gradient(engine, 1)  # RSM: all steps, with the anchor
    model = SD3(**{f.name: getattr(engine.run.model, f.name) for f in fields(SD3)})
    shared = build(replace(engine.run, model=model))
    direct.on_new_rollouts(shared, 0)
    whole = torch.cat([p.grad.flatten() for p in shared.parameters.values()])  # pyright: ignore
    torch.testing.assert_close(by_step.sum(0), whole, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))


def test_unknown_methods_and_single_draws_are_refused(bench) -> None:
    with pytest.raises(UserError, match="--only reffl: expected some of full, leapalign-a1"):
        bench.main(bench.Gradients(only=("reffl",)))
    with pytest.raises(UserError, match="at least 2"):
        bench.main(bench.Gradients(draws=1))

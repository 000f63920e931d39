"""RSM in the loop: gradients at the latent are clipped by the whole batch; what the method needs of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.methods import RSM
from leapalign.run import Run
from leapalign.training import direct, loop
from leapalign.training.tracking import read_metrics


def run_of(tiny_run, **changes) -> Run:
    return tiny_run(**({"method": RSM(), "anchor_weight": 20.0, "batch_size": 8} | changes))


def test_gradients_are_clipped_to_the_quantile_of_all_micro_batches(tiny_run, tiny_module):
    """Second derivation: the norms of one micro-batch of all samples, clipped by hand."""
    run = run_of(tiny_run, model=tiny_module.TinyModel(double=True), micro_batch_size=2)
    engine = loop.build(run)
    batch = [direct.scored(engine, micro) for micro in engine.micro_batches(0)]
    grads = torch.cat([each.result.grad for each in batch])
    norms = grads.flatten(1).norm(dim=1)
    ceiling = norms.quantile(0.8)
    assert (norms > ceiling).sum() == 2
    expected = grads * (norms.clamp(max=ceiling) / norms).view(-1, 1, 1, 1)
    found = direct.clipped(engine, run.method, batch)
    torch.testing.assert_close(torch.cat([each.result.grad for each in found]), expected, rtol=1e-12, atol=0)
    assert direct.update(engine, 0)["gradient_clipped"] == 0.25


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_accumulation_changes_nothing(tiny_run, tiny_module, tmp_path, uses, share):
    same = {
        "model": tiny_module.TinyModel(double=True),
        "method": RSM(trained_share=share),
        "updates_per_rollout": uses,
    }
    same |= {"steps": 4, "checkpoint_every": 4}
    runs = [run_of(tiny_run, **same, micro_batch_size=m, out=str(tmp_path / str(m))) for m in (8, 4, 1)]
    whole, *parts = (loop.train(run).engine.parameters for run in runs)
    for other in parts:
        assert max((whole[name] - other[name]).abs().max().item() for name in whole) < 1e-12
    losses = [[row["loss"] for row in read_metrics(Path(run.out)) if "loss" in row] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == pytest.approx(losses[0], rel=1e-12)


def test_a_batch_above_its_threshold_is_anchored_and_not_clipped(tiny_run):
    above = (replace(tiny_run().rewards[0], threshold=-5.0),)
    metrics = direct.update(loop.build(run_of(tiny_run, rewards=above)), 0)
    assert metrics["skipped"] == 0 and metrics["gradient_clipped"] == 0 and metrics["anchor"] == 0


def test_without_an_anchor_it_is_refused(tiny_run, capsys):
    with pytest.raises(UserError, match=r"rsm: got anchor_weight 0\.0, but its target is .* set anchor_weight to"):
        loop.build(run_of(tiny_run, anchor_weight=0.0))
    assert main(["train", "shapeworld-rsm", "--anchor-weight", "0", "--dry-run"]) == 2
    assert "set anchor_weight to a positive number" in capsys.readouterr().err

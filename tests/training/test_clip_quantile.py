"""Clipping at a quantile of the last gradient norms: the number, what it does to an update, and resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from leapalign.errors import UserError
from leapalign.training import direct
from leapalign.training.engine import build
from leapalign.training.loop import train
from leapalign.training.tracking import read_metrics
from leapalign.training.weights import CLIP_WINDOW, clipping_norm, gradient_norm


def test_the_quantile_is_over_the_last_updates(tiny_run) -> None:
    run, norms = tiny_run(clip_quantile=0.75, max_grad_norm=0.0), []
    drawn = np.random.default_rng(0).exponential(size=CLIP_WINDOW + 20)
    for count, norm in enumerate(drawn, start=1):
        expected = np.quantile(drawn[max(0, count - CLIP_WINDOW) : count], 0.75)
        assert clipping_norm(run, norms, float(norm)) == pytest.approx(expected)
    assert clipping_norm(replace(run, max_grad_norm=1e-3), norms, 1.0) == 1e-3  # the lesser one
    kept = list(norms)
    assert clipping_norm(replace(run, clip_quantile=0.0, max_grad_norm=2.0), norms, 9.0) == 2.0 and norms == kept


def test_an_update_above_the_quantile_is_scaled_down(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = build(tiny_run(clip_quantile=0.5, max_grad_norm=0.0)), []
    engine.norms.extend([1e-6] * 9)
    monkeypatch.setattr(engine.optimizer, "step", lambda: seen.append(gradient_norm(engine.parameters)))
    metrics = direct.update(engine, 0)
    assert metrics["clipped"] == 1 and metrics["grad_norm"] > 1e-5 and len(engine.norms) == 10
    torch.testing.assert_close(float(seen[0]), 1e-6, rtol=1e-2, atol=0)
    free = build(tiny_run(max_grad_norm=0.0))
    assert direct.update(free, 0)["clipped"] == 0 and not free.norms


def test_a_resumed_run_knows_the_norms(tiny_run, tmp_path: Path) -> None:
    settings = {"clip_quantile": 0.5, "max_grad_norm": 0.0, "checkpoint_every": 2}
    whole = train(tiny_run(steps=4, out=str(tmp_path / "whole"), **settings)).out
    run = tiny_run(steps=2, out=str(tmp_path / "parts"), **settings)
    train(run)
    parts = train(replace(run, steps=4), resume=True).out
    one, two = ([{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(out)] for out in (whole, parts))
    assert [m for m in one if m["step"] > 2] == [m for m in two if m["step"] > 2]
    assert any(m.get("clipped") for m in one)


def test_a_quantile_lies_below_1(tiny_run) -> None:
    with pytest.raises(UserError, match="clip_quantile"):
        tiny_run(clip_quantile=1.0)

"""A run too short for the decay of its average says so, with the share of the training that the average will hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.training import loop
from leapalign.training.live_weights import short_average


@pytest.mark.parametrize(
    ("steps", "decay", "share", "fitting"),
    [
        (20, 0.9999, "0.2 %", "0.925"),
        (20, 0.995, "9.5 %", "0.925"),
        (1, 0.9, "10 %", "0"),
        (138, 0.995, "50 %", "0.989"),
    ],
)
def test_the_share_and_a_decay_that_fits(tiny_run, steps, decay, share, fitting):
    said = short_average(tiny_run(steps=steps, ema_decay=decay, out="RUN"))
    assert f"at most {share} of the training" in said and f"--ema-decay {fitting}," in said
    assert "`leapalign export RUN --weights live`" in said


@pytest.mark.parametrize(("steps", "decay"), [(300, 0.995), (139, 0.995), (20, 0.925), (1, 0.0)])
def test_a_run_that_is_long_enough_says_nothing(tiny_run, steps, decay):
    assert not short_average(tiny_run(steps=steps, ema_decay=decay))


def test_it_is_said_at_the_start_and_kept_in_the_log(tiny_run, capsys):
    run = tiny_run(steps=2, ema_decay=0.9999)
    loop.train(run)
    assert capsys.readouterr().err.startswith("the averaged weights")
    assert "will hold at most 0.02 % of the training" in (Path(run.out) / "log.txt").read_text()

"""The rule that ends a run, and the choice of the best evaluation, on histories made by hand."""

from __future__ import annotations

import math

import pytest

from leapalign.monitors import Band, StopWhen
from leapalign.training.watch import is_best, stopped, watched, why_best

HELD, WIDE = "held_out/judge", "open_color_entropy"
RULE = StopWhen(evaluations=2, bands=(Band(monitor=WIDE, least=0.8),))


def history(rewards, held=None, wide=None):
    held, wide = held or [1.0] * len(rewards), wide or [2.5] * len(rewards)
    rows = zip(rewards, held, wide)
    return [{"step": 10 * i, "evaluation_reward": r, HELD: h, WIDE: w} for i, (r, h, w) in enumerate(rows)]


def first_stop(full, rule=RULE) -> int | None:
    return next((i for i in range(1, len(full) + 1) if stopped(full[:i], rule)), None)


def test_a_monitor_outside_its_band_for_n_evaluations_ends_the_run() -> None:
    full = history([0.1, 0.2, 0.3, 0.4, 0.5], wide=[2.5, 2.0, 1.9, 1.8, 1.7])
    assert first_stop(full) == 4
    expected = (
        "stopped after step 30: open_color_entropy is 1.8, below 2, for 2 evaluations in a row, while the training "
        "reward rose from 0.2 to 0.4"
    )
    assert stopped(full[:4], RULE) == expected
    assert first_stop(history([0.1, 0.2, 0.3, 0.4], wide=[2.5, 1.9, 2.5, 1.9])) is None  # not in a row


def test_a_fallen_held_out_reward_ends_the_run() -> None:
    full = history([0.1, 0.2, 0.3, 0.4, 0.5], held=[1.0, 2.0, 1.95, 1.8, 1.8])
    assert first_stop(full) == 5  # 1.95 is within a tenth of the gain of 1.0
    assert "held_out/judge has fallen from 2 to 1.8, for 2" in stopped(full, RULE)
    assert first_stop(history([0.1, 0.2, 0.3], held=[1.0, 0.99, 0.98])) == 3  # without any gain, each fall counts


def test_nothing_ends_while_the_training_reward_falls() -> None:
    assert first_stop(history([0.5, 0.4, 0.3, 0.2], wide=[2.5, 1, 1, 1])) is None
    assert first_stop(history([0.5, 0.4, 0.3, 0.45], wide=[2.5, 1, 1, 1])) == 4  # it has risen from 0.4


def test_off_and_short_histories() -> None:
    full = history([0.1, 0.2, 0.3], wide=[2.5, 1, 1])
    assert first_stop(full, StopWhen()) is None and stopped(full[:2], RULE) == "" and stopped([], RULE) == ""


def test_nan_is_outside_every_band() -> None:
    assert first_stop(history([0.1, 0.2, 0.3], wide=[2.5, math.nan, math.nan])) == 3


def best(full, rule=RULE) -> int:
    step = 0
    for i in range(1, len(full) + 1):
        step = full[i - 1]["step"] if is_best(full[:i], step, rule) else step
    return step


def test_the_best_has_the_highest_held_out_reward_inside_the_bands() -> None:
    full = history([0.1, 0.2, 0.3, 0.4], held=[1.0, 1.5, 2.0, 1.9], wide=[2.5, 2.4, 1.0, 2.4])
    assert best(full) == 30 and best(full[:3]) == 10
    assert best(full, StopWhen(evaluations=2)) == 20
    assert best(history([0.1, 0.2, 0.3], held=[1.0, 1.1, 1.1])) == 10  # the first of equals
    said = "the highest held_out/judge (1.9) of 4 evaluations with all monitors in their bands"
    assert why_best(full, 30, RULE) == said


def test_the_base_is_best_only_if_nothing_else_is_inside_the_bands() -> None:
    assert best(history([0.1, 0.2, 0.3], held=[1.0, 0.8, 0.9])) == 20
    full = history([0.1, 0.2, 0.3], held=[1.0, 2.0, 2.0], wide=[2.5, 1.0, 1.0])
    assert best(full) == 0
    assert why_best(full, 0, RULE) == "the base: no later evaluation had all monitors in their bands"


def test_without_held_out_rewards_the_training_reward_decides() -> None:
    full = [{name: value for name, value in e.items() if name != HELD} for e in history([0.1, 0.3, 0.2])]
    assert best(full) == 10 and "the highest evaluation_reward (0.3)" in why_best(full, 10, RULE)


def test_a_history_keeps_what_the_rule_reads() -> None:
    metrics = {"step": 3, "evaluation_reward": 1.0, HELD: 2.0, WIDE: 3.0, "image/brightness": 4.0}
    assert watched(metrics, RULE) == {name: metrics[name] for name in ("step", "evaluation_reward", HELD, WIDE)}


def test_a_band_that_was_added_on_resuming_is_not_judged() -> None:
    rule = StopWhen(evaluations=1, bands=(Band(monitor="drift", most=1),))
    full = history([0.1, 0.2])
    full[-1]["drift"] = 9.0
    assert stopped(full, rule) == "" and is_best([{**full[0]}, {**full[1], HELD: 9.0}], 0, rule)


@pytest.mark.parametrize("value", [2.0, -2.0])
def test_bands_are_multiples_of_the_value_at_step_0(value) -> None:
    rule = StopWhen(evaluations=1, bands=(Band(monitor=WIDE, least=0.5, most=1.5),))
    for now, ends in ((1.0, False), (3.0, False), (0.9, True), (3.1, True)):
        full = history([0.1, 0.2], wide=[value, math.copysign(now, value)])
        assert bool(stopped(full, rule)) is ends, now

"""Settings of monitors and of the rule that ends a run: what is refused, and what run.json keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from leapalign.codec import dumps, loads
from leapalign.errors import UserError
from leapalign.monitors import NEVER, NOTHING, Band, HeldOut, Monitors, StopWhen
from leapalign.recipes import RECIPES, shapeworld_leapalign
from leapalign.rewards.clip import PickScore
from leapalign.run import Run, config_hash

JUDGE = HeldOut(reward=PickScore(path="embedded:judge"))


def test_papers_recipes_measure_and_stop_nothing() -> None:
    for name, recipe in RECIPES.items():
        if not name.startswith("shapeworld"):
            assert (recipe().monitors, recipe().stop_when) == (NOTHING, NEVER), name


def test_run_json_keeps_them() -> None:
    monitors = Monitors(held_out=(JUDGE,), diversity_prompts=2, features="clip-image", drift_samples=1)
    rule = StopWhen(evaluations=2, bands=(Band(monitor="drift", most=3),))
    run = replace(shapeworld_leapalign(), monitors=monitors, stop_when=rule)
    record = json.loads(dumps(run))
    assert loads(json.dumps(record), Run) == run
    other = record | {"stop_when": None}
    assert config_hash(record) == config_hash(other) != config_hash(record | {"monitors": None})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Monitors(images_per_prompt=1), "images_per_prompt is 1; it must be at least 2"),
        (lambda: Monitors(drift_samples=-1), "drift_samples is -1"),
        (lambda: Monitors(features="dino"), "'dino' is not one of 'pixels', 'clip-image'"),  # pyright: ignore
        (lambda: Band(monitor="drift", least=1.5), "expected 0 <= least <= 1 <= most"),
        (lambda: Band(monitor="drift", most=0.5), "expected 0 <= least <= 1 <= most"),
        (lambda: StopWhen(evaluations=-1), "expected numbers of at least 0"),
        (lambda: StopWhen(bands=(Band(monitor="drift"), Band(monitor="drift"))), "has two bands"),
    ],
)
def test_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_rule_needs_something_to_watch() -> None:
    run, rule = replace(shapeworld_leapalign(), monitors=NOTHING), StopWhen(evaluations=2)
    with pytest.raises(UserError, match="stop_when has nothing to watch"):
        replace(run, stop_when=rule)
    assert replace(run, stop_when=rule, monitors=Monitors(held_out=(JUDGE,))).stop_when == rule

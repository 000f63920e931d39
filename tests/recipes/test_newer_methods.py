"""Recipes of FlowBP and RSM: their settings from a table of the test's own, and each of them end to end, tiny."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.codec import dumps, loads
from leapalign.recipes import RECIPES
from leapalign.recipes.newer_methods import NEWER
from leapalign.run import Run
from leapalign.training.loop import train
from tiny_recipes import tiny, write_folders

# (K or order, b, gamma, alpha)
SETTINGS = {
    "flux-flowbp-sparse-hpsv21": (3, 2, 1, None),
    "flux-flowbp-bridge-hpsv21": (5, 2, 1, 0.1),
    "flux-flowbp-lagrange-hpsv21": (3, None, 0.5, 0.1),
    "sd35m-flowbp-sparse-hpsv21": (4, 1, 0.5, None),
    "sd35m-flowbp-bridge-hpsv21": (5, 4, 0, 0.5),
    "sd35m-flowbp-lagrange-hpsv21": (3, None, 0, 0.1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


def test_there_is_every_recipe():
    assert RECIPES.items() > NEWER.items() and NEWER.keys() >= SETTINGS.keys()
    for name, recipe in NEWER.items():
        assert recipe().name == name and loads(dumps(recipe()), Run) == recipe()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_of_flowbp(name):
    run = NEWER[name]()
    fields = {"image_side_bias", "compensation", "nested_scale"}
    found = [getattr(run.method, field) if hasattr(run.method, field) else None for field in sorted(fields)]
    number, bias, gamma, alpha = SETTINGS[name]
    assert found == [gamma, bias, alpha]
    if "lagrange" in name:
        assert (run.method.num_supports, run.method.second_scale, run.method.distance_floor) == (number, 0.25, 0.2)
        assert run.method.longest_image_side == (1.0 if "flux" in name else 0.4)
    else:
        assert run.method.num_training_steps == number
    if "sd35m" in name:
        assert run.model.shift == "once"
    base = RECIPES[f"{name.split('-')[0]}-leapalign-hpsv21"]()
    assert (run.rewards, run.prompts, run.learning_rate, run.steps) == (
        base.rewards,
        base.prompts,
        base.learning_rate,
        base.steps,
    )


def test_the_settings_of_rsm():
    run = NEWER["sd35m-rsm-hpsv21"]()
    assert 512 // 8 * 512 // 8 * 16 / (2 * run.anchor_weight) == pytest.approx(1.5e7)  # beta
    assert (run.num_sampling_steps, run.learning_rate, run.weight_decay) == (20, 5e-4, 1e-2)
    assert (run.model.guidance_scale, run.model.cfg_grad, run.tuning.rank) == (5.0, "cond", 8)


@pytest.mark.parametrize("name", NEWER)
def test_a_tiny_copy_trains(name, folders, tmp_path):
    result = train(tiny(NEWER[name](), folders, tmp_path / "run"))
    assert result.summary["steps"] == 2 and result.summary["skipped"] == 0

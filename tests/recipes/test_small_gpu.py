"""The LoRA recipes fit their cards, by the planner, and train on tiny folders."""

from __future__ import annotations

import pytest

from leapalign.planning.plan import make_plan
from leapalign.recipes.small_gpu import SMALL_GPU
from leapalign.training.loop import train
from tiny_recipes import tiny, write_folders


@pytest.mark.parametrize(("name", "card"), [("flux-lora-48gb", 48e9), ("flux-lora-24gb", 24e9)])
def test_the_plan_fits_the_card(name, card):
    assert make_plan(SMALL_GPU[name]()).peak < 0.92 * card  # the rest is the allocator's and CUDA's own


def test_a_tiny_copy_trains(tmp_path):
    folders = write_folders(tmp_path / "folders")
    run = tiny(SMALL_GPU["flux-lora-48gb"](), folders, tmp_path / "run")
    assert train(run).summary["steps"] == 2

"""The LoRA recipes fit their cards, by the planner, and train on tiny folders."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from leapalign.planning.plan import make_plan
from leapalign.recipes.small_gpu import SMALL_GPU
from leapalign.training.loop import train
from tiny_recipes import tiny, write_folders


@pytest.mark.parametrize(("name", "card"), [("flux-lora-48gb", 48e9), ("flux-lora-24gb", 24e9)])
def test_the_plan_fits_the_card(name, card):
    assert make_plan(SMALL_GPU[name]()).peak < 0.92 * card  # the rest is the allocator's and CUDA's own


@pytest.mark.parametrize("name", SMALL_GPU)
def test_a_tiny_copy_trains_reloads_and_samples(name, tmp_path):
    """nf4 needs a GPU: the recipe of 24 GB has its base in 8 bits here, where torchao is (`make test-quantization`)."""
    from diffusers import FluxPipeline

    folders = write_folders(tmp_path / "folders")
    run = tiny(SMALL_GPU[name](), folders, tmp_path / "run")
    eight_bits = run.tuning.quantization == "nf4" and importlib.util.find_spec("torchao") is not None
    quantization = "int8" if eight_bits else "none"
    result = train(replace(run, tuning=replace(run.tuning, quantization=quantization)))
    assert result.summary["steps"] == 2
    pipeline = FluxPipeline.from_pretrained(run.model.path)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        noise = torch.Generator().manual_seed(3)
        call = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
        return pipeline("a red circle", generator=noise, **call).images

    base = draw()
    pipeline.load_lora_weights(str(result.saved))
    tuned = draw()
    assert tuned.shape == (1, 3, 16, 16) and bool(torch.isfinite(tuned).all())
    assert bool((tuned != base).any())  # two updates: little, but something

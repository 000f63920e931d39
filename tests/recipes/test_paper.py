"""The paper's recipes: their numbers against a second reading of the paper, and each of them end to end, tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leapalign.codec import dumps, loads
from leapalign.prompts.sets import HPDv2
from leapalign.recipes import RECIPES
from leapalign.recipes.paper import PAPER
from leapalign.run import Run
from leapalign.training.loop import train
from tiny_recipes import tiny, write_folders

SAMPLER = {"flux": "FluxPipeline", "sd35m": "StableDiffusion3Pipeline"}

# A table of its own, read from the paper: task -> (reward, lambda, alpha, learning rate)
TASKS = {
    "hpsv21": ("hpsv2", 0.55, 0.3, 1e-5),
    "pickscore": ("pickscore", 0.4, 0.1, 1e-5),
    "hpsv3-mjhq": ("hpsv3", 13.5, 0.1, 8e-6),
    "geneval": ("hpsv2", 0.55, 0.3, 1e-5),
}
METHODS = ("leapalign", "refl", "draft-lv", "drtune")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


def test_there_is_every_recipe():
    expected = {f"flux-{method}-{task}" for method in METHODS for task in TASKS}
    assert set(PAPER) == expected | {f"sd35m-{method}-hpsv21" for method in METHODS}
    assert RECIPES.items() > PAPER.items()


@pytest.mark.parametrize("name", PAPER)
def test_the_numbers_of_the_paper(name):
    run = PAPER[name]()
    family, task = name.split("-", 1)[0], next(task for task in TASKS if name.endswith(task))
    reward, threshold, alpha, rate = TASKS[task]
    assert (run.name, run.out, run.method.name) == (name, f"runs/{name}", name[len(family) + 1 : -len(task) - 1])
    (term,) = run.rewards
    assert (term.reward.name, term.threshold, run.learning_rate) == (reward, threshold, rate)
    assert (run.batch_size, run.num_sampling_steps, run.ema_decay) == (64, 25, 0.995)
    assert (run.betas, run.weight_decay) == ((0.9, 0.999), 1e-4)
    assert run.model.guidance_scale == 3.5
    assert (run.steps, run.model.height, run.model.width) == ((300, 720, 720) if family == "flux" else (200, 512, 512))
    method = run.method
    if method.name == "leapalign":
        assert (method.nested_scale, method.distance_floor, method.num_leaps) == (alpha, 0.1, 2)
        assert (method.weighting, method.reward_input, method.timestep_range) == ("both", "x_0", (0.0, 1.0))
    if method.name in ("refl", "drtune"):
        assert round(method.early_stop * 25) == 11
    assert getattr(method, "num_copies", 2) == getattr(method, "num_training_steps", 2) == 2


def test_the_prompts_of_the_paper():
    assert PAPER["flux-leapalign-hpsv21"]().prompts == HPDv2(split="train", num=50_000)
    mjhq, geneval = PAPER["flux-refl-hpsv3-mjhq"]().prompts, PAPER["flux-leapalign-geneval"]().prompts
    assert (mjhq.name, mjhq.split, mjhq.test_size) == ("mjhq-30k", "train", 500)
    assert (geneval.name, geneval.split, geneval.num) == ("geneval", "train", 50_000)


def test_every_recipe_says_where_it_stands():
    for name, recipe in PAPER.items():
        assert "Table" in (recipe.__doc__ or ""), name
        run = recipe()
        assert loads(dumps(run), Run) == run


@pytest.mark.parametrize("name", PAPER)
def test_a_tiny_copy_trains_reloads_and_samples(name, folders, tmp_path):
    import diffusers

    family = name.split("-", 1)[0]
    run = tiny(PAPER[name](), folders, tmp_path / "run")
    result = train(run)
    assert result.summary["steps"] == 2
    pipeline = getattr(diffusers, SAMPLER[family]).from_pretrained(result.pipeline)
    base = load_file(Path(run.model.path) / "transformer" / "diffusion_pytorch_model.safetensors")
    tuned = pipeline.transformer.state_dict()
    assert sum(not torch.equal(tuned[key], base[key]) for key in base) > 0.5 * len(base)
    assert json.loads((result.out / "run.json").read_text())["name"] == name
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline("a red circle", height=16, width=16, num_inference_steps=2, output_type="pt").images
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.isfinite(pixels).all()

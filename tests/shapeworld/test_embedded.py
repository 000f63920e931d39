"""The shipped folders: small, in float16, opened by plain `from_pretrained`, as good as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from leapalign.errors import UserError
from leapalign.evaluation.evaluate import evaluate
from leapalign.evaluation.sampling import Sampling
from leapalign.evaluation.statistics import report
from leapalign.models.sd3 import SD3
from leapalign.prompts import ShapeWorldPrompts
from leapalign.recipes import RECIPES
from leapalign.rewards.clip import PickScore
from leapalign.seeds import generator
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import render
from leapalign.storage.embedded import FOLDER, NAMES, resolve
from leapalign.studies.shapeworld_build.measure import reward_accuracy

PROMPTS = ["a photo of a red circle and a blue square", "a photo of a ring above a cross"]


def test_the_folders_are_small_and_in_float16() -> None:
    files = [p for name in NAMES for p in (FOLDER / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert len(weights) == 7  # transformer, VAE, three text encoders; reward; judge
    for path in weights:
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_unknown_embedded_folder_is_refused_and_other_paths_pass() -> None:
    with pytest.raises(UserError, match="embedded:generator"):
        resolve("embedded:nothing")
    assert resolve("some/folder") == "some/folder"


@pytest.mark.parametrize("name", NAMES)
def test_each_folder_has_a_card_with_its_making(name: str) -> None:
    text = (FOLDER / name / "README.md").read_text()
    for fact in ("python -m leapalign.studies.shapeworld_build", "Commit ", "seed ", "steps", " s on", "Data: "):
        assert fact in text, fact


def test_the_pipelines_own_call_draws_what_our_model_draws() -> None:
    """Plain `StableDiffusion3Pipeline.from_pretrained`, same noise, with guidance and two prompts at once."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(resolve("embedded:generator"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    config = SD3(path="embedded:generator", height=32, width=32, guidance_scale=2.5, max_sequence_length=5)
    model = config.load("cpu", "float32")
    noise = model.noise([generator(0, step=0, sample=i, purpose="test") for i in range(2)])
    expected = pipeline(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=8,
        guidance_scale=2.5,
        max_sequence_length=5,
        latents=noise,
        output_type="pt",
    ).images
    x, sigmas = noise, model.sigmas(8)
    velocity = model.velocity(model.encode(PROMPTS))
    with torch.no_grad():
        for t in range(8, 0, -1):
            x = x + (sigmas[t - 1] - sigmas[t]) * velocity(x, sigmas[t])
        images = model.decode(x)
    torch.testing.assert_close(images, expected, atol=2e-4, rtol=0)


def test_the_grid_ends_with_a_real_step() -> None:
    model = SD3(path="embedded:generator", height=32, width=32, max_sequence_length=5).load("cpu", "float32")
    for num_steps in (8, 16, 25):
        assert abs(float(model.sigmas(num_steps)[1]) - 1 / 16) < 1e-6


def test_latents_have_about_unit_variance() -> None:
    """tau = 0.1 (Eq. 12) presumes it."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(f"{FOLDER}/generator/vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(0)
    scenes = [c.scene_of(prompt, rng) for prompt in c.train_prompts(64)]
    with torch.no_grad():
        mode = vae.encode(torch.from_numpy(render(scenes)) * 2 - 1).latent_dist.mode()
    latents = (mode - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_the_rewards_tell_near_misses_from_the_truth(name: str) -> None:
    found = reward_accuracy(f"embedded:{name}", num=60)["accuracy"]
    for kind in ("swapped relation", "swapped colors", "count ± 1"):
        assert found[kind]["accuracy"] > 0.93, (kind, found)


def test_the_rewards_resize_matters() -> None:
    """32 pixels are not what the towers take: pasted on a 48-pixel canvas instead, the scores are others."""
    reward = PickScore(path="embedded:reward").load("cpu", "float32")
    rng = np.random.default_rng(1)
    captions = [c.draw(c.split("color_attr")[1], rng) for _ in range(16)]
    prompts = [caption["prompt"] for caption in captions]
    images = torch.from_numpy(render([c.scene_of(caption, rng) for caption in captions]))
    scores = reward(images, prompts)
    resized = F.interpolate(images, size=(48, 48), mode="bicubic", antialias=True)
    inside = reward(resized.clamp(0, 1), prompts)  # nearly what must happen inside, where overshoot is not cut
    assert (inside - scores).abs().mean() < 0.02
    pasted = F.pad(images, (8, 8, 8, 8), value=0.94)
    assert (reward(pasted, prompts) - scores).abs().mean() > 0.05
    assert {PickScore(path="embedded:judge").load("cpu", "float32").preprocess.size} != {32}


def test_the_base_draws_single_objects_and_follows_compositions_only_partly() -> None:
    recipe = RECIPES["shapeworld-leapalign"]()
    model = recipe.model.load("cpu", "float32")
    prompts = ShapeWorldPrompts(split="test", num=24).load()
    sampling = Sampling(num_steps=recipe.num_sampling_steps, batch_size=72, seed=3)
    found = report(evaluate(model, prompts, sampling=sampling, rewards={}, detector=detect))["geneval"]
    assert found["single_object"]["accuracy"] > 0.8  # 24 pictures; the card says more
    assert 0.3 < found["overall"]["accuracy"] < 0.75


def test_the_prompts_of_a_recipe_are_not_the_tests() -> None:
    train = {p.text for p in RECIPES["shapeworld-leapalign"]().prompts.load()}
    test = {p.text for p in ShapeWorldPrompts(split="test", num=200).load()}
    singles = {caption["prompt"] for ws in c.all_captions("single_object") for caption in ws}
    assert not train & test and singles <= test


def test_tokenizers_know_every_word() -> None:
    folder = Path(resolve("embedded:generator"))
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    words = {w for t in c.TASKS for ws in c.all_captions(t) for p in ws for w in re.findall(r"\w+", p["prompt"])}
    assert {f"{word}</w>" for word in words} <= set(vocabulary)

"""golden/aesthetic: the published head on given features, and the whole way from picture files."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden_folder import golden
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.aesthetic.model import AestheticReward
from leapalign.rewards.linear_head import PLACES, WIDTHS


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("aesthetic") / "data.safetensors")


@pytest.fixture(scope="module")
def reward() -> AestheticReward:
    return Aesthetic(path=str(golden("clipscore")), head=str(golden("aesthetic"))).load()


def largest(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def test_head(reward: AestheticReward, data: dict) -> None:
    assert largest(reward.score(data["embeddings"]), data["scores"]) < 1e-5
    assert largest(reward.model.head(data["embeddings"]), data["scores"]) > 1, "the feature's length counts"


def test_gradient_of_the_head(reward: AestheticReward, data: dict) -> None:
    features = data["embeddings"][:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(features).sum(), features)
    expected = data["grad_embeddings_0_4"]
    assert largest(gradient, expected) < 1e-4 * expected.abs().max()


def test_from_picture_files_to_scores(reward: AestheticReward, data: dict) -> None:
    pictures = [Image.open(golden("clipscore") / f"image_{index}.png") for index in range(8)]
    pixels = reward.preprocess.from_pil(pictures)
    assert largest(pixels, load_file(golden("clipscore") / "data.safetensors")["pixel_values"]) < 1e-5
    assert largest(reward.image_features(pixels), data["clip_features"]) < 1e-5
    assert largest(reward.score_pil(pictures, [""] * 8), data["clip_scores"]) < 1e-5


def test_layout_of_the_published_head() -> None:
    config = json.loads((golden("aesthetic") / "config.json").read_text())
    names = {f"layers.{place}.{kind}" for place in PLACES for kind in ("weight", "bias")}
    assert names == set(config["keys"]) and list(WIDTHS) == config["widths"] and config["activations"] is None

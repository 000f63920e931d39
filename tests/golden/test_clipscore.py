"""golden/clipscore: the three named conventions, on all pairs, and torchmetrics' way with a batch."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden_folder import golden
from leapalign.images import to_tensor
from leapalign.rewards.clip import CLIPScore, Convention
from leapalign.rewards.clip.model import ClipReward, torchmetrics_mean


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("clipscore") / "data.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((golden("clipscore") / "cases.json").read_text())


@pytest.fixture(scope="module")
def pictures(cases: dict) -> list[Image.Image]:
    return [Image.open(golden("clipscore") / image["png"]) for image in cases["images"]]


def loaded(convention: Convention, clamp: bool = False) -> ClipReward:
    return CLIPScore(path=str(golden("clipscore")), convention=convention, clamp=clamp).load(prompts=False)


def matrix(reward: ClipReward, pictures: list, ids: Tensor) -> Tensor:
    """Scores [image, prompt] through Pillow, from files to numbers."""
    images = reward.image_features(reward.preprocess.from_pil(pictures))
    return reward.score(images[:, None], reward.text_features_of_ids(ids)[None])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=tolerance, rtol=0)


def test_cosine(pictures: list, data: dict) -> None:
    reward = loaded("cosine")
    pixels = reward.preprocess.from_pil(pictures)
    assert close(pixels, data["pixel_values"], 1e-5)
    assert close(reward.image_features(pixels), data["image_embeds"], 1e-5)
    assert close(reward.text_features_of_ids(data["input_ids"]), data["text_embeds"], 1e-5)
    assert close(matrix(reward, pictures, data["input_ids"]), data["cosine"], 1e-5)


def test_hessel(cases: dict, pictures: list, data: dict) -> None:
    ids = data["input_ids_prefixed"]
    free, clamped = (matrix(loaded("hessel", clamp), pictures, ids) for clamp in (False, True))
    assert close(loaded("hessel").text_features_of_ids(ids), data["text_embeds_prefixed"], 1e-5)
    assert close(free / 2.5, data["cosine_prefixed"], 1e-5)
    assert close(clamped, data["hessel"], 1e-5)
    assert clamped.diagonal().tolist() == pytest.approx(cases["hessel_paired"], abs=1e-5)
    assert (free < 0).any(), "without the clamp negative cosines stay, and keep their gradient"


def test_hessel_prefix_stands_before_the_caption(cases: dict) -> None:
    assert loaded("hessel").head.prefix == cases["hessel_prefix"]
    assert loaded("cosine").head.prefix == loaded("torchmetrics").head.prefix == ""


def test_torchmetrics_pairs(pictures: list, data: dict) -> None:
    free, clamped = (loaded("torchmetrics", clamp) for clamp in (False, True))
    pixels = free.preprocess.from_pil(pictures)
    assert close(pixels, data["hf_pixel_values"], 1e-5)
    assert close(free.image_features(pixels), data["hf_image_embeds"], 1e-5)
    assert close(matrix(free, pictures, data["input_ids"]) / 100, data["hf_cosine"], 1e-5)
    assert close(matrix(clamped, pictures, data["input_ids"]), data["torchmetrics"], 1e-3)
    assert close(matrix(free, pictures, data["input_ids"]).diagonal(), data["torchmetrics_batch_raw"], 1e-3)


def test_torchmetrics_batches(cases: dict, pictures: list, data: dict) -> None:
    scores = matrix(loaded("torchmetrics"), pictures, data["input_ids"])
    assert len(cases["torchmetrics_batches"]) == 3
    for batch in cases["torchmetrics_batches"]:
        value = torchmetrics_mean(scores[batch["images"], batch["prompts"]])
        assert float(value) == pytest.approx(batch["value"], abs=1e-3)
    assert float(torchmetrics_mean(torch.tensor([1.0, -3.0]))) == 0


def test_the_crops_differ_where_a_remainder_is_odd(pictures: list, data: dict) -> None:
    """Picture 7 alone: the control for floor against half to even."""
    differs = [bool((a != b).any()) for a, b in zip(data["pixel_values"], data["hf_pixel_values"])]
    assert differs == [index == 7 for index in range(8)]
    image = to_tensor(pictures[7])[None]
    ours = [loaded(convention).preprocess(image) for convention in ("cosine", "hessel", "torchmetrics")]
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])

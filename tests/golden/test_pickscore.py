"""golden/pickscore: features, both scales, probabilities and the gradient, for every prompt and picture."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden_folder import golden
from leapalign.images import to_tensor
from leapalign.rewards.clip import PickScore
from leapalign.rewards.clip.model import ClipReward


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("pickscore") / "data.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((golden("pickscore") / "cases.json").read_text())


@pytest.fixture(scope="module")
def pictures(cases: dict) -> list[Image.Image]:
    return [Image.open(golden("pickscore") / image["png"]) for image in cases["images"]]


def loaded(output: str) -> ClipReward:
    return PickScore(path=str(golden("pickscore")), output=output).load(prompts=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cosine() -> ClipReward:
    return loaded("cosine")


@pytest.fixture(scope="module")
def logit() -> ClipReward:
    return loaded("logit")


def as_images(picture: Image.Image) -> Tensor:
    return to_tensor(picture)[None]


def matrix(reward: ClipReward, pixel_values: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Scores [prompt, image] of normalised pixels."""
    text = reward.text_features_of_ids(data["input_ids"], data["attention_mask"])
    return reward.score(reward.image_features(pixel_values)[None], text[:, None])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=tolerance, rtol=0)


def test_pixels_on_both_paths(cosine: ClipReward, pictures: list, data: dict) -> None:
    tensors = torch.cat([cosine.preprocess(as_images(picture)) for picture in pictures])
    assert close(tensors, data["pixel_values_tensor_path"], 1e-5)
    assert close(cosine.preprocess.from_pil(pictures), data["pixel_values"], 1e-5)


def test_features(cosine: ClipReward, data: dict) -> None:
    assert close(cosine.image_features(data["pixel_values"]), data["image_embeds"], 1e-5)
    text = cosine.text_features_of_ids(data["input_ids"], data["attention_mask"])
    assert close(text, data["text_embeds"], 1e-5)
    without_mask = cosine.text_features_of_ids(data["input_ids"])
    assert close(without_mask, data["text_embeds"], 1e-5), "what follows the end token has no influence"


def test_cosine_of_all_pairs_on_both_paths(cosine: ClipReward, pictures: list, data: dict) -> None:
    assert close(matrix(cosine, cosine.preprocess.from_pil(pictures), data), data["cosine"], 1e-5)
    tensors = torch.cat([cosine.preprocess(as_images(picture)) for picture in pictures])
    assert close(matrix(cosine, tensors, data), data["cosine_tensor_path"], 1e-5)
    assert (data["cosine"] - data["cosine_tensor_path"]).abs().max() > 1e-3, "the paths can be told apart"


def test_logit_scaled_scores_and_probabilities(logit: ClipReward, cases: dict, pictures: list, data: dict) -> None:
    assert logit.logit_scale == pytest.approx(cases["logit_scale_exp"], rel=1e-6)
    scores = matrix(logit, logit.preprocess.from_pil(pictures), data)
    assert close(scores, data["scores"], 1e-3)
    assert close(scores.softmax(dim=1), data["probs"], 1e-5)


def test_scores_and_gradient_through_the_public_call(
    cosine: ClipReward, cases: dict, pictures: list, data: dict
) -> None:
    for case in cases["gradients"]:
        images = as_images(pictures[case["image"]]).requires_grad_()
        rows = slice(case["prompt"], case["prompt"] + 1)
        score = cosine.score_ids(images, data["input_ids"][rows], data["attention_mask"][rows])
        assert score.tolist() == pytest.approx([case["cosine"]], abs=1e-5)
        score.sum().backward()
        expected = data[case["grad_key"]]
        assert images.grad is not None
        assert (images.grad[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_key_names_of_the_full_size_model(cosine: ClipReward) -> None:
    """A CLIPModel of ViT-H/14's size has the published file's names and shapes (no weights: meta device)."""
    from transformers import CLIPConfig, CLIPModel

    stored = json.loads((golden("pickscore") / "full_size_keys.json").read_text())
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**stored["config"]))
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes == {name: shape for name, shape in stored["keys"].items() if not name.endswith("position_ids")}

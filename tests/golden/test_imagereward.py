"""golden/imagereward: pixels, features, scores and the gradient of the published package, from its own key names."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from golden_folder import golden, tokenizer
from leapalign.images import to_tensor
from leapalign.rewards.checkpoint import Checkpoint
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.imagereward.model import MEAN, STD, BlipReward, BlipScorer, blip_configs, from_original
from leapalign.rewards.linear_head import head_widths


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("imagereward") / "data.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((golden("imagereward") / "cases.json").read_text())


@pytest.fixture(scope="module")
def pictures(cases: dict) -> list[Image.Image]:
    return [Image.open(golden("imagereward") / image["png"]) for image in cases["images"]]


def loaded() -> BlipReward:
    return ImageReward(path=str(golden("imagereward"))).load(prompts=False)


@pytest.fixture(scope="module")
def reward() -> BlipReward:
    return loaded()


def as_images(picture: Image.Image) -> Tensor:
    return to_tensor(picture)[None]


def largest(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def matrix(reward: BlipReward, pixel_values: Tensor, data: dict) -> Tensor:
    """Scores [image, row of ids] of normalised pixels."""
    ids, mask = data["input_ids"], data["attention_mask"]
    features = reward.image_features(pixel_values)
    rows = [reward.score(reward.hidden(one.expand(len(ids), -1, -1), ids, mask)) for one in features]
    return torch.stack(rows)


def test_pixels_on_both_paths(reward: BlipReward, pictures: list, data: dict) -> None:
    assert largest(reward.preprocess.from_pil(pictures), data["pixel_values"]) < 1e-5
    tensors = torch.cat([reward.preprocess(as_images(picture)) for picture in pictures])
    assert largest(tensors, data["pixel_values_tensor_path"]) < 1e-5


def test_features_and_what_the_first_token_has_read(reward: BlipReward, data: dict) -> None:
    features = reward.image_features(data["pixel_values"])
    assert largest(features, data["image_embeds"]) < 1e-4
    hidden = reward.hidden(features, data["input_ids"][:8], data["attention_mask"][:8])
    assert largest(hidden, data["cls_hidden_paired"]) < 1e-4


def test_scores_of_all_pairs_on_both_paths(reward: BlipReward, pictures: list, data: dict) -> None:
    assert largest(matrix(reward, reward.preprocess.from_pil(pictures), data), data["rewards"]) < 1e-4
    tensors = torch.cat([reward.preprocess(as_images(picture)) for picture in pictures])
    assert largest(matrix(reward, tensors, data), data["rewards_tensor_path"]) < 1e-4
    assert largest(data["rewards"], data["rewards_tensor_path"]) > 1e-3, "the paths can be told apart"


def test_the_packages_score_of_single_pairs(reward: BlipReward, cases: dict, pictures: list, data: dict) -> None:
    scores = matrix(reward, reward.preprocess.from_pil(pictures), data)
    for pair in cases["score_method_pairs"]:
        assert float(scores[pair["image"], pair["prompt"]]) == pytest.approx(pair["reward"], abs=1e-4)


def test_gradient_through_the_public_call(reward: BlipReward, cases: dict, pictures: list, data: dict) -> None:
    for case in cases["gradients"]:
        image, at = as_images(pictures[case["image"]]).requires_grad_(), case["prompt"]
        score = reward.score_ids(image, data["input_ids"][at : at + 1], data["attention_mask"][at : at + 1])
        assert score.tolist() == pytest.approx([case["reward"]], abs=1e-4)
        (gradient,) = torch.autograd.grad(score.sum(), image)
        expected = data[case["grad_key"]][None]
        assert largest(gradient, expected) < 1e-4 * expected.abs().max()


def test_prompts_through_the_published_vocabulary(cases: dict, data: dict) -> None:
    reward = ImageReward(path=str(golden("imagereward")), processor=tokenizer("bert")).load()
    ids, mask = reward.tokenize(cases["prompts"])
    count = len(cases["prompts"])
    assert torch.equal(ids, data["input_ids"][:count]) and torch.equal(mask, data["attention_mask"][:count])


def test_another_epsilon_and_another_crop_are_noticed(pictures: list, data: dict) -> None:
    wrong = loaded()
    for module in wrong.model.vision.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            module.eps = 1e-5
    assert largest(matrix(wrong, data["pixel_values"], data), data["rewards"]) > 1e-3
    floor = dataclasses.replace(loaded(), preprocess=dataclasses.replace(wrong.preprocess, rounding="floor"))
    assert largest(matrix(floor, floor.preprocess.from_pil(pictures), data), data["rewards"]) > 1e-2


def test_the_published_names_and_shapes_fill_a_model_of_full_size() -> None:
    """Names, shapes and the sizes taken from them; no weights: meta device."""
    stored = json.loads((golden("imagereward") / "full_size_keys.json").read_text())
    weights = {name: torch.empty(shape, device="meta") for name, shape in stored["keys"].items()}
    checkpoint = Checkpoint(name="imagereward", file="published", weights=weights)
    vision, text = blip_configs(checkpoint, {})
    with torch.device("meta"):
        model = BlipScorer(vision, text, head_widths(checkpoint, "mlp."))
    converted = {name: weight.shape for name, weight in from_original(weights).items()}
    assert converted == {name: weight.shape for name, weight in model.state_dict().items()}
    told = stored["med_config"]
    assert (text.num_attention_heads, text.layer_norm_eps) == (told["num_attention_heads"], told["layer_norm_eps"])
    assert (vision.image_size, vision.num_attention_heads, vision.layer_norm_eps) == (224, 16, 1e-6)


def test_mean_and_deviation_are_the_published_ones() -> None:
    config = json.loads((golden("imagereward") / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (MEAN, STD)

"""golden/hpsv2: pixels, features, scores and gradients of the published package, from its own key names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden_folder import golden, tokenizer
from leapalign.images import to_tensor
from leapalign.rewards import preprocess
from leapalign.rewards.checkpoint import Checkpoint
from leapalign.rewards.clip.model import ClipReward
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv2.model import clip_config, from_open_clip


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("hpsv2") / "data.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict:
    return json.loads((golden("hpsv2") / "cases.json").read_text())


@pytest.fixture(scope="module")
def images(cases: dict, data: dict) -> list[Tensor]:
    """Each [1, 3, H, W]."""
    return [data[image["tensor"]][None] for image in cases["images"]]


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return HPSv2(path=str(golden("hpsv2"))).load(prompts=False)


def largest(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def matrix(reward: ClipReward, pixel_values: Tensor, data: dict) -> Tensor:
    """Scores [image, prompt] of normalised pixels."""
    text = reward.text_features_of_ids(data["input_ids"])
    return reward.score(reward.image_features(pixel_values)[:, None], text[None])


def test_the_stored_weights_are_half_precision(reward: ClipReward) -> None:
    stored = load_file(golden("hpsv2") / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.float32}


def test_pixels(reward: ClipReward, images: list, data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.cat([reward.preprocess(image) for image in images])
    assert largest(pixels, data["pixel_values"]) < 1e-5
    monkeypatch.setattr(preprocess, "resize", lambda image, shape: F.interpolate(image, size=shape, mode="bicubic"))
    assert largest(torch.cat([reward.preprocess(image) for image in images]), data["pixel_values"]) > 1


def test_picture_files_are_the_tensors(cases: dict, images: list) -> None:
    for case, image in zip(cases["images"], images):
        if case["png"]:
            picture = Image.open(golden("hpsv2") / case["png"])
            assert torch.equal(to_tensor(picture)[None], image)


def test_features(reward: ClipReward, data: dict) -> None:
    assert largest(reward.image_features(data["pixel_values"]), data["image_features"]) < 1e-5
    assert largest(reward.text_features_of_ids(data["input_ids"]), data["text_features"]) < 1e-5


def test_scores_of_all_pairs(reward: ClipReward, cases: dict, images: list, data: dict) -> None:
    pixels = torch.cat([reward.preprocess(image) for image in images])
    scores = matrix(reward, pixels, data)
    assert largest(scores, data["scores"]) < 1e-5
    for pair in cases["paired_scores"]:
        at = pair["prompt"]
        score = reward.score_ids(images[pair["image"]], data["input_ids"][at : at + 1])
        assert score.tolist() == pytest.approx([pair["score"]], abs=1e-5)


def test_what_follows_the_end_token_has_no_influence(reward: ClipReward, data: dict) -> None:
    """The package fills with 0, tokenizers of transformers with the end token and a mask."""
    ids = data["input_ids"].clone()
    mask = (torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True)).long()
    ids[mask == 0] = ids.max()
    assert largest(reward.text_features_of_ids(ids, mask), data["text_features"]) < 1e-5


def test_gradients_through_the_public_call(reward: ClipReward, cases: dict, images: list, data: dict) -> None:
    for case in cases["gradients"]:
        image, at = images[case["image"]].clone().requires_grad_(), case["prompt"]
        score = reward.score_ids(image, data["input_ids"][at : at + 1])
        assert score.tolist() == pytest.approx([case["score"]], abs=1e-5)
        (gradient,) = torch.autograd.grad(score.sum(), image)
        expected = data[case["grad_key"]][None]
        assert largest(gradient, expected) < 1e-4 * expected.abs().max()


def test_prompts_through_the_published_vocabulary(cases: dict, data: dict) -> None:
    """From words to features. The recorded facts say for which prompts transformers' tokenizer gives the same ids."""
    reward = HPSv2(path=str(golden("hpsv2")), processor=tokenizer("clip")).load()
    same = []
    for prompt, expected in zip(cases["prompts"], data["input_ids"]):
        (ids,), (mask,) = reward.tokenize(prompt)
        length = int(mask.sum())
        same.append(length == int(expected.argmax()) + 1 and torch.equal(ids[:length], expected[:length]))
    assert same == cases["hf_clip_tokenizer_gives_same_ids"] and same.count(False) == 2
    equal = [prompt for prompt, is_same in zip(cases["prompts"], same) if is_same]
    assert largest(reward.text_features(equal), data["text_features"][torch.tensor(same)]) < 1e-5


def test_another_activation_is_noticed(tmp_path: Path, data: dict) -> None:
    config = json.loads((golden("hpsv2") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quick_gelu": True}))
    (tmp_path / "model.safetensors").symlink_to(golden("hpsv2") / "model.safetensors")
    wrong = HPSv2(path=str(tmp_path)).load(prompts=False)
    assert largest(matrix(wrong, data["pixel_values"], data), data["scores"]) > 1e-3


def test_the_published_names_and_shapes_fill_a_clip_model_of_full_size() -> None:
    """Names, shapes and the sizes taken from them; no weights: meta device."""
    from transformers import CLIPModel

    stored = json.loads((golden("hpsv2") / "full_size_keys.json").read_text())
    weights = {name: torch.empty(shape, device="meta") for name, shape in stored["keys"].items()}
    config = clip_config(Checkpoint(name="hpsv2", file="published", weights=weights), {})
    with torch.device("meta"):
        model = CLIPModel(config)
    converted = {name: weight.shape for name, weight in from_open_clip(weights).items()}
    assert converted == {name: weight.shape for name, weight in model.state_dict().items()}
    assert sum(weight.numel() for weight in model.parameters()) == 986_109_441
    told, vision, text = stored["config"], config.vision_config, config.text_config
    assert vision.hidden_size // vision.num_attention_heads == told["vision_cfg"]["head_width"]
    assert text.num_attention_heads == told["text_cfg"]["heads"]
    assert (vision.image_size, text.max_position_embeddings, config.projection_dim) == (224, 77, 1024)

"""golden/hpsv3: sizes, patches, both outputs, the gradient, key names, prompt text and ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden_folder import golden
from leapalign.images import to_tensor
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.hpsv3.model import PIXELS, REWARD_TOKEN, TEMPLATE, HPSv3Reward, expected_shapes, load_chat
from leapalign.rewards.qwen_vl import (
    IMAGE_TOKEN,
    PLACEHOLDER,
    Patches,
    QwenPreprocess,
    fill,
    read_template,
    smart_resize,
)

TINY_PIXELS = 12544  # 112 x 112, to which the stored cases were resized
TOKENIZER = "LEAPALIGN_QWEN2_VL"  # a folder with the tokenizer of Qwen/Qwen2-VL-7B-Instruct
VOCABULARY = 151658  # with <|Reward|>


def stored(file: str) -> Any:
    return json.loads((golden("hpsv3") / file).read_text())


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return load_file(golden("hpsv3") / "data.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict:
    return stored("cases.json")


@pytest.fixture(scope="module")
def pictures(cases: dict) -> list[Image.Image]:
    return [Image.open(golden("hpsv3") / image["png"]) for image in cases["images"]]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> HPSv3Reward:
    """The stored weights through the public loader, with the stored sizes as a config.json of transformers."""
    folder, config = tmp_path_factory.mktemp("hpsv3"), stored("config.json")
    text = dict(config["text_config"])
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
    flat = {"model_type": "qwen2_vl", **text, "vision_config": config["vision_config"], **config["ids"]}
    (folder / "config.json").write_text(json.dumps(flat))
    shutil.copy(golden("hpsv3") / "model.safetensors", folder / "HPSv3.safetensors")
    loaded = HPSv3(path=str(folder), processor=str(folder)).load(prompts=False)
    small = QwenPreprocess(min_pixels=TINY_PIXELS, max_pixels=TINY_PIXELS)
    return dataclasses.replace(loaded, preprocess=small, reward_token_id=config["reward_token_id"])


def as_images(picture: Image.Image) -> Tensor:
    return to_tensor(picture)[None]


def both_paths(preprocess: QwenPreprocess, pictures: list[Image.Image]) -> tuple[list[Patches], list[Patches]]:
    """By Pillow and on tensors."""
    return [preprocess.from_pil(p) for p in pictures], [preprocess(as_images(p))[0] for p in pictures]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=tolerance, rtol=0)


def test_sizes_of_every_row() -> None:
    """A size of 0 is what published code returns for some extreme shapes; here it is an error, as its null is."""
    rows = stored("smart_resize.json")["rows"]
    assert len(rows) > 1000 and PIXELS == 200704
    for height, width, *expected in rows:
        for pixels, size in ((PIXELS, expected[:2]), (TINY_PIXELS, expected[2:])):
            if None in size or 0 in size:
                with pytest.raises(ValueError, match=f"{width} x {height} pixels"):
                    smart_resize(height, width, pixels, pixels)
            else:
                assert list(smart_resize(height, width, pixels, pixels)) == size, (height, width, pixels)
    assert smart_resize(768, 768, PIXELS, PIXELS) == (420, 420) and smart_resize(720, 720, PIXELS, PIXELS) == (448, 448)


def test_patches_on_both_paths(reward: HPSv3Reward, cases: dict, pictures: list, data: dict) -> None:
    pillow, tensors = both_paths(reward.preprocess, pictures)
    for n, case in enumerate(cases["images"]):
        assert list(pillow[n].grid) == list(tensors[n].grid) == case["grid_thw"]
        assert close(pillow[n].values, data[f"pixel_values.{n}"], 1e-5)
        assert close(tensors[n].values, data[f"pixel_values_tensor_path.{n}"], 1e-5)


def test_patches_at_the_real_size(cases: dict, data: dict) -> None:
    case = cases["real_size"]
    real = QwenPreprocess(min_pixels=PIXELS, max_pixels=PIXELS)
    pillow, tensors = both_paths(real, [Image.open(golden("hpsv3") / case["png"])])
    assert list(pillow[0].grid) == case["grid_thw"] == data["real_size.image_grid_thw"][0].tolist()
    assert close(pillow[0].values[::16], data["real_size.pixel_values_every16"], 1e-5)
    assert close(tensors[0].values[::16], data["real_size.pixel_values_tensor_path_every16"], 1e-5)


def test_outputs_on_both_paths(reward: HPSv3Reward, cases: dict, pictures: list, data: dict) -> None:
    pillow, tensors = both_paths(reward.preprocess, pictures)
    outputs = reward.outputs(pillow, list(data["input_ids"]))
    assert close(outputs, data["outputs"], 1e-4) and close(outputs, data["outputs_single"], 1e-4)
    assert outputs[:, 0].tolist() == pytest.approx(cases["mu"], abs=1e-4)
    assert outputs[:, 1].tolist() == pytest.approx(cases["log_sigma"], abs=1e-4)
    assert close(reward.outputs(tensors, list(data["input_ids"])), data["outputs_tensor_path"], 1e-4)
    assert (data["outputs"] - data["outputs_tensor_path"]).abs().max() > 1e-3, "the paths can be told apart"


def test_padding_and_what_follows_the_reward_token_change_nothing(
    reward: HPSv3Reward, pictures: list, data: dict
) -> None:
    pillow, _ = both_paths(reward.preprocess, pictures)
    whole = reward.outputs(pillow, list(data["input_ids"]))
    bare = [ids[mask.bool()] for ids, mask in zip(data["input_ids"], data["attention_mask"])]
    assert torch.equal(reward.outputs(pillow, bare), whole)
    assert torch.equal(torch.cat([reward.outputs([p], [ids]) for p, ids in zip(pillow, bare)]), whole)


def test_gradient_through_the_public_call(reward: HPSv3Reward, cases: dict, pictures: list, data: dict) -> None:
    for case in cases["gradients"]:
        images = as_images(pictures[case["image"]]).requires_grad_()
        score = reward.score_ids(images, data["input_ids"][case["image"], None])
        assert score.tolist() == pytest.approx([case["value"]], abs=1e-4)
        score.sum().backward()
        expected = data[case["grad_key"]]
        assert images.grad is not None
        assert (images.grad[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_control_positions_in_two_dimensions_are_noticed(reward: HPSv3Reward, pictures: list, data: dict) -> None:
    """Qwen2-VL's own positions: an image token has the row and the column of its place, the text goes on behind."""
    pillow, _ = both_paths(reward.preprocess, pictures)

    def two_dimensional(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        start, length = 5, kwargs["inputs_embeds"].shape[1]  # four text tokens and <|vision_start|>
        rows, columns = grid[1] // 2, grid[2] // 2
        place = torch.arange(rows * columns)
        image = start + torch.stack([0 * place, place // columns, place % columns])
        text = torch.arange(length - start - len(place)) + start + max(rows, columns)
        parts = [torch.arange(start).expand(3, -1), image, text.expand(3, -1)]
        return args, kwargs | {"position_ids": torch.cat(parts, dim=1)[:, None]}

    hook = reward.model.backbone.language_model.register_forward_pre_hook(two_dimensional, with_kwargs=True)
    wrong = []
    for picture, ids in zip(pillow, data["input_ids"]):
        grid = picture.grid
        wrong.append(reward.outputs([picture], [ids]))
    hook.remove()
    assert 0.1 < (torch.cat(wrong) - data["outputs"]).abs().max() < 0.2  # stored: 0.14


def test_key_names_of_the_full_size_model() -> None:
    """The published names, of a model of the published size (no weights: meta device)."""
    from transformers import Qwen2VLConfig

    full = stored("full_size_keys.json")
    config = Qwen2VLConfig(text_config=full["config"]["text"], vision_config=full["config"]["vision"])
    shapes = {published(key): shape for key, shape in expected_shapes(config).items()}
    assert shapes == {key: shape for key, shape in full["keys"].items() if key != "lm_head.weight"}
    total = sum(torch.Size(shape).numel() for shape in full["keys"].values())
    assert total == 8_292_152_882 and full["keys"]["model.embed_tokens.weight"][0] == VOCABULARY


def published(key: str) -> str:
    return key.replace("language_model.", "model.")


def test_prompt_text_byte_by_byte() -> None:
    text = read_template(TEMPLATE)
    assert text.encode() == (golden("hpsv3") / "prompt_template.txt").read_bytes()
    assert hashlib.sha256(text.encode()).hexdigest() == stored("prompt_ids.json")["template_sha256"]
    assert [text.count(part) for part in (PLACEHOLDER, IMAGE_TOKEN, REWARD_TOKEN)] == [1, 1, 1]


def test_prompt_ids_are_consistent_with_the_template() -> None:
    """What can be checked without the vocabulary: special tokens in the template's order, and a constant frame."""
    ids = stored("prompt_ids.json")
    names = {number: token for token, number in ids["special_ids"].items()}
    order = [part for part in re.split(r"(<\|\w+\|>)", read_template(TEMPLATE)) if part in ids["special_ids"]]
    frames = set()
    for row in ids["rows"]:
        assert [names[i] for i in row["input_ids"] if i in names] == order
        assert row["input_ids"][row["reward_token_index"]] == VOCABULARY - 1 and row["length"] == len(row["input_ids"])
        frames.add(tuple(row["input_ids"][row["reward_token_index"] :]))
        assert row["prompt"] in fill(read_template(TEMPLATE), row["prompt"])
    assert len(frames) == 1 and len(ids["rows"]) == 13


@pytest.mark.skipif(
    TOKENIZER not in os.environ, reason=f"needs the vocabulary of Qwen2-VL: set {TOKENIZER} to a folder"
)
def test_prompt_ids_with_the_real_vocabulary() -> None:
    ids = stored("prompt_ids.json")
    chat = load_chat("hpsv3", str(Path(os.environ[TOKENIZER])), VOCABULARY, ids["special_ids"][IMAGE_TOKEN])
    for row in ids["rows"]:
        assert chat(row["prompt"], 1).tolist() == row["input_ids"], row["prompt"]
        image = [ids["special_ids"][IMAGE_TOKEN]]
        at = row["input_ids"].index(image[0])
        assert chat(row["prompt"], 256).tolist() == row["input_ids"][:at] + 256 * image + row["input_ids"][at + 1 :]

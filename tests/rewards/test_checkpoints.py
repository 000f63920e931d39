"""HPSv2, ImageReward and the aesthetic score beyond the contracts: what a checkpoint may be, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leapalign.errors import UserError
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.imagereward import ImageReward
from tiny_checkpoints import (
    hpsv2_weights,
    imagereward_weights,
    save,
    write_tiny_aesthetic,
    write_tiny_hpsv2,
    write_tiny_imagereward,
)

PROMPTS = ["a red circle", "two blue star"]
HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 40, 33)


def hpsv2(folder: Path, **fields: Any) -> HPSv2:
    return HPSv2(**{"path": str(folder), "processor": "", **fields})


def imagereward(folder: Path, **fields: Any) -> ImageReward:
    return ImageReward(**{"path": str(folder), "processor": "", **fields})


def aesthetic(folder: Path, **fields: Any) -> Aesthetic:
    return Aesthetic(**{"path": str(folder), "head": str(folder / HEAD), **fields})


REWARDS: dict[str, tuple[Callable[[Path], Path], Callable[..., Any], str]] = {
    "hpsv2": (write_tiny_hpsv2, hpsv2, "HPS_v2.1_compressed.pt"),
    "imagereward": (write_tiny_imagereward, imagereward, "ImageReward.pt"),
    "aesthetic": (write_tiny_aesthetic, aesthetic, HEAD),
}


@pytest.fixture(params=REWARDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[..., Any], Path]:
    """A configuration and its checkpoint file in a folder that is complete."""
    write, make, file = REWARDS[request.param]
    return make, write(tmp_path) / file


def content(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def weights(file: Path) -> dict[str, Tensor]:
    loaded = content(file)
    return loaded.get("state_dict", loaded)


# What a checkpoint may be


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_a_file_or_its_folder_in_either_format(name: str, tmp_path: Path, images: Tensor) -> None:
    write, make, file = REWARDS[name]
    folder = write(tmp_path)
    expected = make(folder).load()(images, PROMPTS)
    assert torch.equal(make(folder, path=str(folder / file)).load()(images, PROMPTS), expected)
    save(weights(folder / file), folder / "model.safetensors")
    assert torch.equal(make(folder, path=str(folder / "model.safetensors")).load()(images, PROMPTS), expected)
    (folder / file).unlink()
    assert torch.equal(make(folder).load()(images, PROMPTS), expected)


def test_the_aesthetic_head_may_be_safetensors_or_a_folder(tmp_path: Path, images: Tensor) -> None:
    folder, elsewhere = write_tiny_aesthetic(tmp_path / "clip"), tmp_path / "head"
    expected = aesthetic(folder).load()(images, PROMPTS)
    elsewhere.mkdir()
    save(weights(folder / HEAD), elsewhere / "model.safetensors")
    for head in (elsewhere, elsewhere / "model.safetensors", folder):
        assert torch.equal(aesthetic(folder, head=str(head)).load()(images, PROMPTS), expected)


def test_hpsv2_version_names_the_file(tmp_path: Path, images: Tensor) -> None:
    write_tiny_hpsv2(tmp_path)
    write_tiny_hpsv2(tmp_path, "HPS_v2_compressed.pt", seed=1)
    new, old = (hpsv2(tmp_path, version=version).load()(images, PROMPTS) for version in ("2.1", "2.0"))
    assert (new - old).abs().min() > 1e-3
    assert torch.equal(hpsv2(tmp_path, path=str(tmp_path / "HPS_v2_compressed.pt")).load()(images, PROMPTS), old)


def test_half_precision_files_are_computed_with_in_float32(case: Any, images: Tensor) -> None:
    make, file = case
    exact = make(file.parent).load()(images, PROMPTS)
    save({key: w.half() if w.is_floating_point() else w for key, w in weights(file).items()}, file)
    reward = make(file.parent).load()
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.float32}
    torch.testing.assert_close(reward(images, PROMPTS), exact, rtol=0.05, atol=0.05)


def test_heads_stay_in_float32_under_bfloat16(tmp_path: Path) -> None:
    score = imagereward(write_tiny_imagereward(tmp_path / "a")).load(dtype="bfloat16").model
    assert score.mlp.dtype == torch.float32 and score.text.dtype == score.vision.dtype == torch.bfloat16
    look = aesthetic(write_tiny_aesthetic(tmp_path / "b")).load(dtype="bfloat16").model
    assert look.head.dtype == torch.float32 and look.visual_projection.weight.dtype == torch.bfloat16


def test_sizes_come_from_shapes_and_heads_from_config(tmp_path: Path) -> None:
    clip = hpsv2(write_tiny_hpsv2(tmp_path / "a")).load().model.config
    assert (clip.vision_config.num_hidden_layers, clip.vision_config.num_attention_heads) == (2, 2)
    assert (clip.text_config.hidden_size, clip.projection_dim, clip.vision_config.image_size) == (16, 12, 24)
    blip = imagereward(write_tiny_imagereward(tmp_path / "b")).load().model
    assert (blip.vision.config.image_size, blip.text.config.max_position_embeddings) == (24, 40)
    assert (blip.vision.config.num_attention_heads, blip.text.config.num_attention_heads) == (2, 2)


# What scores


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_ids_give_the_same_score_as_prompts(name: str, tmp_path: Path, images: Tensor) -> None:
    write, make, _ = REWARDS[name]
    config = make(write(tmp_path))
    with_text, with_ids = config.load(), config.load(prompts=False)
    tokens = with_text.tokenizer(PROMPTS, padding=True, return_tensors="pt")  # shorter than the model's own padding
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    torch.testing.assert_close(with_ids.score_ids(images, ids, mask), with_text(images, PROMPTS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 images and 1 rows of ids"):
        with_ids.score_ids(images, ids[:1])
    with pytest.raises(UserError, match="prompts=False"):
        with_ids(images, PROMPTS)


def test_imagereward_cuts_text_at_35_tokens(tmp_path: Path) -> None:
    reward = imagereward(write_tiny_imagereward(tmp_path)).load()
    ids, mask = reward.tokenize(["red " * 60, "a"])
    assert ids.shape == (2, 35) and mask.sum(dim=1).tolist() == [35, 3]
    assert ids[0, 0] == 0 and ids[0, -1] == 1, "start and end stay"


def test_imagereward_reads_the_end_of_the_text_first_token_on(tmp_path: Path, images: Tensor) -> None:
    """The mask is bidirectional: with a causal one the first token would see no other word."""
    reward = imagereward(write_tiny_imagereward(tmp_path)).load()
    ids = torch.tensor([[0, 5, 6, 1]])
    other = torch.tensor([[0, 5, 9, 1]])
    assert (reward.score_ids(images[:1], ids) - reward.score_ids(images[:1], other)).abs() > 1e-3


def test_hpsv2_sees_the_whole_picture_and_aesthetic_only_the_centre(tmp_path: Path) -> None:
    wide = torch.rand(1, 3, 24, 72)
    edge = wide.clone()
    edge[..., :8] = 0.5
    seen = []
    for name in ("hpsv2", "imagereward", "aesthetic"):
        write, make, _ = REWARDS[name]
        reward = make(write(tmp_path / name)).load()
        seen.append(not torch.equal(reward(wide, ["a"]), reward(edge, ["a"])))
    assert seen == [True, False, False]


def test_aesthetic_drops_the_text_tower(tmp_path: Path, images: Tensor) -> None:
    reward = aesthetic(write_tiny_aesthetic(tmp_path)).load()
    assert not any("text" in name for name, _ in reward.model.named_parameters())
    assert torch.equal(reward.score_images(images), reward(images, PROMPTS))


# What is refused


def test_missing_weights_are_not_replaced_by_random_ones(case: Any) -> None:
    make, file = case
    kept = weights(file)
    gone = next(key for key in sorted(kept) if key.endswith("bias") and "proj" not in key)
    del kept[gone]
    save(kept, file)
    with pytest.raises(UserError, match="lacks 1 weights"):
        make(file.parent).load()


def test_unknown_weights_are_named(case: Any) -> None:
    make, file = case
    save(weights(file) | {"ls_1.gamma": torch.ones(3)}, file)
    with pytest.raises(UserError, match=r"has no place for 1 weights, e\.g\. ls_1\.gamma"):
        make(file.parent).load()


def test_another_shape_is_named(case: Any) -> None:
    make, file = case
    kept = weights(file)
    bias = next(key for key in sorted(kept) if key.endswith("bias") and "proj" not in key)
    save(kept | {bias: torch.zeros(5)}, file)
    with pytest.raises(UserError, match=r"another shape for 1 weights, e\.g\. .* \[5\] instead of"):
        make(file.parent).load()


def test_another_model_is_named(case: Any) -> None:
    make, file = case
    save({"conv.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=r"has no weight .*, but 1 others, e\.g\. conv\.weight"):
        make(file.parent).load()


def test_a_missing_file_is_named(case: Any) -> None:
    make, file = case
    file.unlink()
    for path in (str(file.parent / "nothing"), str(file.parent / "nothing.pt"), "nowhere/at-all"):
        fields = {"head": path} if make is aesthetic else {"path": path}
        with pytest.raises(UserError, match=rf"no checkpoint at '{path}'; .* or model\.safetensors"):
            make(file.parent, **fields).load()


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def test_pickles_are_not_opened(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, file = case
    monkeypatch.chdir(file.parent)
    torch.save({"state_dict": weights(file), "more": Trap()}, file)
    with pytest.raises(UserError, match="other Python objects, which are never unpickled here"):
        make(file.parent).load()
    file.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UserError, match="cannot be read as a file of tensors"):
        make(file.parent).load()
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("damage", ["half of it", "text", "nothing", "a number", "a list"])
def test_broken_files_are_named(case: Any, damage: str) -> None:
    make, file = case
    if damage in ("a number", "a list"):
        torch.save({"a number": 3, "a list": [torch.zeros(2)]}[damage], file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"half of it": whole[: len(whole) // 2], "text": b"not a checkpoint", "nothing": b""}[damage])
    with pytest.raises(UserError, match=r"has no table of weights|cannot be read as a file of tensors"):
        make(file.parent).load()


def test_broken_safetensors_are_named(tmp_path: Path) -> None:
    write_tiny_hpsv2(tmp_path)
    (tmp_path / "HPS_v2.1_compressed.pt").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not readable as safetensors"):
        hpsv2(tmp_path).load()


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("hpsv2", "visual.conv1.weight", (24, 192), "expected 4 axes"),
        ("hpsv2", "visual.positional_embedding", (11, 24), "10 patch positions, which do not form a square"),
        ("imagereward", "mlp.layers.7.weight", (2, 4), "ends in 2 numbers; expected 1"),
        ("aesthetic", "layers.7.weight", (2, 4), "ends in 2 numbers; expected 1"),
        ("aesthetic", "layers.0.weight", (16, 9), "reads 9 numbers, but the CLIP at .* gives 12"),
    ],
)
def test_sizes_that_make_no_model(tmp_path: Path, name: str, key: str, shape: tuple[int, ...], message: str) -> None:
    write, make, file = REWARDS[name]
    folder = write(tmp_path)
    changed = {key: torch.zeros(shape)}
    if key == "layers.7.weight" or key == "mlp.layers.7.weight":
        changed[key.replace("weight", "bias")] = torch.zeros(2)
    save(weights(folder / file) | changed, folder / file)
    with pytest.raises(UserError, match=message):
        make(folder).load()


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_heads_are_never_guessed(name: str, tmp_path: Path) -> None:
    write, make, _ = REWARDS[name]
    folder = write(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"its shapes do not tell the heads; put config\.json"):
        make(folder).load()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("hpsv2", {"vision_cfg": {"head_width": 7}, "text_cfg": {"heads": 2}}, "do not divide the widths 24 and 16"),
        ("hpsv2", {"vision_cfg": {"head_width": "12"}, "text_cfg": {"heads": 2}}, "expected positive whole numbers"),
        ("hpsv2", {"vision_cfg": {}, "text_cfg": {}}, "expected positive whole numbers"),
        (
            "imagereward",
            {"vision": {"num_heads": 5}, "text": {"num_attention_heads": 2}},
            "do not divide the widths 24 and 16",
        ),
        (
            "imagereward",
            {"vision": {"num_heads": 2}, "text": {"num_attention_heads": 0}},
            "expected positive whole numbers",
        ),
        ("imagereward", ["a list"], "holds a list, expected an object"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, name: str, config: Any, message: str) -> None:
    write, make, _ = REWARDS[name]
    folder = write(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        make(folder).load()


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (write_tiny_hpsv2(tmp_path) / "config.json").write_text("{heads: 2}")
    with pytest.raises(UserError, match=r"config\.json is not readable JSON"):
        hpsv2(tmp_path).load()


def test_aesthetic_wants_quick_gelu(tmp_path: Path) -> None:
    config = json.loads((write_tiny_aesthetic(tmp_path) / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"says hidden_act 'gelu' .* needs 'quick_gelu'"):
        aesthetic(tmp_path).load()


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_missing_and_broken_tokenizers_are_named(name: str, tmp_path: Path) -> None:
    write, make, _ = REWARDS[name]
    folder = write(tmp_path)
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        make(folder).load()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer at .* expected tokenizer\.json"):
        make(folder).load()
    with pytest.raises(UserError, match="no tokenizer at 'nowhere/at-all'"):
        make(folder, processor="nowhere/at-all").load()
    assert make(folder).load(prompts=False).tokenizer is None


def test_dtypes_are_checked_before_a_file_is_read() -> None:
    for config in (HPSv2(path="x"), ImageReward(path="x"), Aesthetic(path="x", head="x")):
        with pytest.raises(UserError, match="dtype 'int8' is unknown"):
            config.load(dtype="int8")


def test_tiny_checkpoints_have_the_published_names() -> None:
    """Else the tests above would prove nothing about published files."""
    from golden_folder import golden

    for name, tiny in (("hpsv2", hpsv2_weights()), ("imagereward", imagereward_weights())):
        stored = json.loads((golden(name) / "full_size_keys.json").read_text())["keys"]
        assert tiny.keys() <= stored.keys()
        assert all(len(stored[key]) == weight.ndim for key, weight in tiny.items())
    head = load_file(golden("aesthetic") / "model.safetensors")
    assert head.keys() == {key.removeprefix("mlp.") for key in imagereward_weights() if key.startswith("mlp.")}


def test_configurations_import_nothing_heavy() -> None:
    """`--help` shows them, and has a second for everything."""
    files = ", ".join(f"leapalign.rewards.{name}" for name in REWARDS)
    code = f"import sys, {files}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

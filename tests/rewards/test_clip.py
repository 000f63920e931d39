"""PickScore and CLIPScore beyond the contracts: scales, captions, the cache, and folders that must be refused."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from leapalign.errors import UserError
from leapalign.rewards import preprocess
from leapalign.rewards.clip import CLIPScore, PickScore
from tiny_clip import IMAGE_SIZE, TEXT_LENGTH, write_tiny_clip

PROMPTS = ["a red circle", "two blue star"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_clip(tmp_path)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 40, 33)


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def by_hand(folder: Path, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, float]:
    """Cosine and exp(logit_scale) through CLIPModel's own forward and its own text inputs."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    text = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = preprocess.Preprocess(size=IMAGE_SIZE)(images)
        out = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
        return (out.logits_per_image / model.logit_scale.exp()).diagonal(), float(model.logit_scale.exp())


def test_scales(folder: Path, images: torch.Tensor) -> None:
    cosine, logit_scale = by_hand(folder, images, PROMPTS)
    assert logit_scale == pytest.approx(math.exp(3.7))
    expected = {"cosine": cosine, "logit": logit_scale * cosine}
    for output in ("cosine", "logit"):
        scores = PickScore(path=str(folder), output=output).load()(images, PROMPTS)
        torch.testing.assert_close(scores, expected[output], rtol=1e-5, atol=1e-6)
    for convention, factor in (("cosine", 1.0), ("torchmetrics", 100.0)):
        scores = CLIPScore(path=str(folder), convention=convention).load()(images, PROMPTS)
        same_crop = convention == "torchmetrics"  # 33 x 40 becomes 24 x 29: a remainder of 5, which both crops cut at 2
        assert same_crop or preprocess.crop_offset(29, 24, "half-even") == 2
        torch.testing.assert_close(scores, factor * cosine, rtol=1e-4, atol=1e-5)


def test_hessel_reads_the_prefixed_caption(folder: Path, images: torch.Tensor) -> None:
    hessel, plain = (CLIPScore(path=str(folder), convention=name).load() for name in ("hessel", "cosine"))
    expected = 2.5 * plain(images, ["A photo depicts " + prompt for prompt in PROMPTS])
    torch.testing.assert_close(hessel(images, PROMPTS), expected)


def test_clamp_is_the_published_max_and_has_no_gradient_below_zero(folder: Path) -> None:
    images = torch.rand(16, 3, 40, 33, requires_grad=True)
    prompts = ["green star", "a", "two blue", "left of"] * 4
    free, clamped = (CLIPScore(path=str(folder), clamp=clamp).load()(images, prompts) for clamp in (False, True))
    below = free < 0
    assert below.any() and not below.all()
    assert torch.equal(clamped, torch.where(below, 0.0, free))
    gradients = [torch.autograd.grad(scores.sum(), images)[0].abs().amax(dim=(1, 2, 3)) for scores in (free, clamped)]
    assert gradients[0].min() > 0 and torch.equal(gradients[1] > 0, ~below)


def test_clamp_keeps_nan(folder: Path, images: torch.Tensor) -> None:
    images[0, 0, 20, 16] = math.nan
    assert CLIPScore(path=str(folder), clamp=True).load()(images, PROMPTS).isnan().tolist() == [True, False]


def test_text_is_encoded_once_a_prompt(folder: Path, images: torch.Tensor) -> None:
    reward, calls = PickScore(path=str(folder)).load(), []
    reward.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    first = reward(images, PROMPTS)
    assert len(calls) == 2 and torch.equal(reward(images, PROMPTS), first) and len(calls) == 2
    reward(images, ["a", PROMPTS[1]])
    assert len(calls) == 3 and not any(feature.requires_grad for feature in reward.cache.values())


def test_text_feature_does_not_depend_on_company(folder: Path) -> None:
    """Bit for bit: a resumed run meets its prompts in other company."""
    together, alone = (PickScore(path=str(folder)).load() for _ in range(2))
    rows = together.text_features(["two blue star", "a red circle", "green"])
    assert torch.equal(rows[1], alone.text_features(["a red circle"])[0])


def test_long_prompts_are_cut_and_keep_their_end(folder: Path) -> None:
    ids, mask = PickScore(path=str(folder)).load().tokenize("red " * 30)
    assert ids.shape == (1, TEXT_LENGTH) and ids[0, -1] == 1 and ids[0, 0] == 0 and bool(mask.all())


def test_ids_give_the_same_score_as_prompts(folder: Path, images: torch.Tensor) -> None:
    with_text, with_ids = PickScore(path=str(folder)).load(), PickScore(path=str(folder)).load(prompts=False)
    ids, mask = (torch.cat(parts) for parts in zip(*(with_text.tokenize(prompt) for prompt in PROMPTS)))
    torch.testing.assert_close(with_ids.score_ids(images, ids, mask), with_text(images, PROMPTS), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 images and 1 rows of ids"):
        with_ids.score_ids(images, ids[:1])
    with pytest.raises(UserError, match="prompts=False"):
        with_ids(images, PROMPTS)


def test_pictures_may_differ_in_size(folder: Path) -> None:
    reward = PickScore(path=str(folder)).load()
    files = [*pictures(torch.rand(1, 3, 50, 30)), *pictures(torch.rand(1, 3, 24, 24))]
    both = reward.score_pil(files, PROMPTS)
    single = [reward.score_pil([file], [prompt]) for file, prompt in zip(files, PROMPTS)]
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-5, atol=1e-6)
    assert not both.requires_grad
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        reward.score_pil(files, PROMPTS[:1])


@pytest.mark.parametrize("mistake", ["no antialiasing", "bilinear", "no crop"])
def test_the_contracts_tolerance_notices_a_wrong_resize(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    wrong = {
        "no antialiasing": lambda image, shape: F.interpolate(image, size=shape, mode="bicubic"),
        "bilinear": lambda image, shape: F.interpolate(image, size=shape, mode="bilinear", antialias=True),
        "no crop": lambda image, shape: F.interpolate(image, size=(24, 24), mode="bicubic", antialias=True),
    }
    images = (torch.rand(8, 3, 50, 61) * 0.6 + 0.2).mul(255).round() / 255
    reward, prompts = PickScore(path=str(folder)).load(), ["a red circle"] * 8
    reference = reward.score_pil(pictures(images), prompts)
    assert (reward(images, prompts) - reference).abs().max() < 1e-2
    monkeypatch.setattr(preprocess, "resize", wrong[mistake])
    assert (reward(images, prompts) - reference).abs().max() > 2e-2


def test_bfloat16_keeps_the_logit_scale(tmp_path: Path) -> None:
    reward = PickScore(path=str(write_tiny_clip(tmp_path)), output="logit").load(dtype="bfloat16")
    assert reward.logit_scale == pytest.approx(math.exp(3.7), rel=1e-6)
    assert reward.model.visual_projection.weight.dtype == torch.bfloat16
    assert math.exp(float(torch.tensor(3.7).bfloat16())) != pytest.approx(math.exp(3.7), rel=1e-3)


def write_processor(folder: Path, file: str = "preprocessor_config.json", **changes: object) -> None:
    content = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}, "resample": 3}
    content |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **changes}
    nested = {"image_processor": content} if file == "processor_config.json" else content
    (folder / file).write_text(json.dumps(nested))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_numbers_come_from_the_processor_file(folder: Path, file: str) -> None:
    write_processor(folder, file)
    expected = preprocess.Preprocess(size=24, resize=30, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert PickScore(path=str(folder)).load().preprocess == expected
    half_even = dataclasses.replace(expected, rounding="half-even")
    assert CLIPScore(path=str(folder)).load().preprocess == half_even


def test_processor_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("processor")
    for file in folder.glob("tokenizer*"):
        file.rename(elsewhere / file.name)
    write_processor(elsewhere)
    reward = PickScore(path=str(folder), processor=str(elsewhere)).load()
    assert reward.preprocess.resize == 30 and reward.tokenize("red")[0][0, 1] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 24, "width": 24}},
        {"resample": 2},
        {"do_center_crop": False},
        {"crop_size": {"height": 24, "width": 20}},
    ],
)
def test_other_preprocessing_is_refused(folder: Path, changes: dict) -> None:
    write_processor(folder, **changes)
    with pytest.raises(UserError, match="is not CLIP's"):
        PickScore(path=str(folder)).load()


def test_crop_must_be_the_models_size(folder: Path) -> None:
    write_processor(folder, crop_size=16)
    with pytest.raises(UserError, match="crops to 16 pixels, but the model's image_size is 24"):
        PickScore(path=str(folder)).load()


def test_missing_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer at .* expected tokenizer.json"):
        PickScore(path=str(folder)).load()
    assert PickScore(path=str(folder)).load(prompts=False).tokenizer is None


def test_missing_folder_is_named() -> None:
    with pytest.raises(UserError, match=r"no config\.json at 'nowhere/at-all'"):
        PickScore(path="nowhere/at-all").load()


def test_missing_weights_are_not_replaced_by_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIPModel, e\.g\. visual_projection\.weight"):
        PickScore(path=str(folder)).load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights that CLIPModel can read"):
        PickScore(path=str(folder)).load()


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = torch.zeros(5, 24)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no weights that CLIPModel can read"):
        PickScore(path=str(folder)).load()


def test_other_architectures_and_dtypes_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        PickScore(path=str(folder)).load(dtype="int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(UserError, match="is a 'siglip' model"):
        PickScore(path=str(folder)).load()


def test_tokenizer_must_fit_the_model(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["purple"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 18 entries, the model knows 17"):
        PickScore(path=str(folder)).load()


def test_configurations_import_nothing_heavy() -> None:
    """`--help` shows them, and has a second for everything."""
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, leapalign.rewards.clip, leapalign.rewards.base; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

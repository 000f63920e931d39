"""Properties of every reward. A folder in rewards/ that is not in BUILT_IN, or has no case here, fails."""

from __future__ import annotations

import dataclasses
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from PIL import Image
from torch import Tensor

import leapalign.rewards
from leapalign.images import to_tensor
from leapalign.lookup.recipes import load_file
from leapalign.rewards import BUILT_IN
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.base import DescribedReward, UnfitImage
from leapalign.rewards.clip import CLIPScore, PickScore
from leapalign.rewards.custom import Custom
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.jpeg import JPEGSize
from leapalign.rewards.ocr import OCR
from leapalign.rewards.unified import UnifiedReward
from leapalign.rewards.value_model import ValueModel
from leapalign.verification.rewards import check_reward
from tiny_checkpoints import write_tiny_aesthetic, write_tiny_hpsv2, write_tiny_imagereward
from tiny_clip import write_tiny_clip
from tiny_crnn import write_tiny_crnn
from tiny_qwen import write_tiny_hpsv3, write_tiny_unified

PROMPTS = ("a red circle", "two blue star left of a square", "a photo of green")
QUOTING = ('a sign that says "red"', "'blue star' on a square", 'the word "green"')


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one reward, made in a scratch folder, and how far Pillow's path may be from the tensors'."""

    make: Callable[[Path], Any]
    pillow_tolerance: float  # in units of the score; about 2.5 times what `photos` give
    prompts: tuple[str, ...] = PROMPTS
    weightless: bool = False  # no weights of ours: nothing to freeze, no dtype to load
    step: float = 1e-5  # of finite differences; smaller for networks with kinks, so that it crosses none


# Measured: cosine 0.0043, logit 0.17, hessel 0.012, torchmetrics 0.43. Without antialiasing 0.138, and bilinear 0.042
# for the cosine, so the tolerance tells the paths' difference from a mistake (tests/rewards/test_clip.py does it).
# HPSv2 0.0005 (0.074 and 0.0085), ImageReward 0.025 (0.78 and 0.18), aesthetic 0.0092 (2.4 and 0.45);
# 0.029 with transformers 5.0, which draws other random weights.
# OCR 0.0065 (0.083 and 0.30); tests/rewards/test_ocr.py has pictures that shrink.
# HPSv3: 0.015 at scores of 3 to 6. It enlarges `photos`; its shrinking is compared in tests/golden/test_hpsv3.py.
CASES = {
    "pickscore cosine": Case(lambda folder: PickScore(path=str(write_tiny_clip(folder))), 1e-2),
    "pickscore logit": Case(lambda folder: PickScore(path=str(write_tiny_clip(folder)), output="logit"), 0.45),
    "clipscore cosine": Case(lambda folder: CLIPScore(path=str(write_tiny_clip(folder))), 1e-2),
    "clipscore hessel": Case(lambda folder: CLIPScore(path=str(write_tiny_clip(folder)), convention="hessel"), 0.03),
    "clipscore torchmetrics": Case(
        lambda folder: CLIPScore(path=str(write_tiny_clip(folder)), convention="torchmetrics"), 1.0
    ),
    "hpsv2": Case(lambda folder: HPSv2(path=str(write_tiny_hpsv2(folder / "hpsv2")), processor=""), 1.2e-3),
    "imagereward": Case(
        lambda folder: ImageReward(path=str(write_tiny_imagereward(folder / "imagereward")), processor=""), 0.065
    ),
    "aesthetic": Case(lambda folder: aesthetic(write_tiny_aesthetic(folder / "aesthetic")), 0.075),
    "ocr": Case(lambda folder: OCR(path=str(write_tiny_crnn(folder))), 0.016, QUOTING, step=1e-6),
    "ocr region": Case(
        lambda folder: OCR(path=str(write_tiny_crnn(folder)), region=(0.1, 0.3, 0.9, 0.8)), 0.016, QUOTING, step=1e-6
    ),
    "custom": Case(lambda folder: custom(folder), 1e-5, weightless=True),
    "hpsv3": Case(lambda folder: HPSv3(path=str(write_tiny_hpsv3(folder)), processor=str(folder)), 0.04),
    "jpeg": Case(lambda folder: JPEGSize(), 0.0, weightless=True),
    "value model": Case(lambda folder: ValueModel(of=JPEGSize(), output="logit"), 1e-5, weightless=True),
    "unified alignment": Case(lambda folder: unified(folder, "alignment"), 0.0),
    "unified quality": Case(lambda folder: unified(folder, "quality"), 0.0),
}


def custom(folder: Path) -> Custom:
    """A user's file, given on the command line."""
    file = folder / "my_reward.py"
    file.write_text(
        "def mine(images, prompts):\n"
        "    lengths = images.new_tensor([len(prompt) for prompt in prompts])\n"
        "    return images[:, 0].square().mean((1, 2)) * lengths\n"
    )
    load_file(str(file))
    return Custom(function="my_reward.py:mine")


def aesthetic(folder: Path) -> Aesthetic:
    return Aesthetic(path=str(folder), head=str(folder / "sac+logos+ava1-l14-linearMSE.pth"))


def unified(folder: Path, aspect: Any) -> UnifiedReward:
    """A model whose every token is a whole answer, so that its scores are numbers; of any other they would be NaN."""
    return UnifiedReward(path=str(write_tiny_unified(folder)), aspect=aspect, max_new_tokens=1)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def prompts(case: Case) -> tuple[str, ...]:
    return case.prompts


@pytest.fixture
def config(case: Case, tmp_path: Path) -> Any:
    return case.make(tmp_path)


def photos() -> list[Image.Image]:
    """Three 8-bit pictures, 61 wide and 50 high: shapes under fine noise, without pure black and white.

    The noise makes a resize without antialiasing visible; Pillow's clipping of overshoot needs black or white and has
    its own expected outputs in tests/golden.
    """
    y, x = torch.meshgrid(torch.linspace(0, 1, 50), torch.linspace(0, 1, 61), indexing="ij")
    disc = ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.08).float()
    shapes = torch.stack(
        [torch.stack([x, y, disc]), torch.stack([disc, 1 - disc, x * y]), torch.stack([1 - x, disc * y, 0.3 + 0 * x])]
    )
    noise = torch.rand(shapes.shape, generator=torch.Generator().manual_seed(5)) - 0.5
    levels = (255 * (0.3 + 0.4 * shapes + 0.3 * noise)).round().byte()
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]


def as_images(pictures: list[Image.Image], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([to_tensor(picture) for picture in pictures]).to(dtype)


def test_every_folder_is_listed_and_every_reward_has_a_case(tmp_path: Path) -> None:
    folders = {info.name for info in pkgutil.iter_modules(leapalign.rewards.__path__) if info.ispkg}
    listed = {cls.__module__.rpartition(".")[2] for cls in BUILT_IN if cls is not Custom}
    assert folders == listed, "list each folder's rewards in leapalign.rewards.BUILT_IN"
    assert {type(case.make(tmp_path)) for case in CASES.values()} == set(BUILT_IN), "give every reward a Case"


def test_listing_rewards_imports_no_torch() -> None:
    code = "import leapalign.rewards, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("cls", BUILT_IN)
def test_configuration_declares_its_facts(cls: type) -> None:
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(cls))
    for fact, kind in get_type_hints(DescribedReward).items():
        if kind in (ClassVar[bool], ClassVar[str]):
            assert fact in vars(cls) and isinstance(vars(cls)[fact], get_args(kind)[0]), fact


def test_returns_one_float32_score_an_image(config: Any, prompts: Any) -> None:
    scores = config.load()(as_images(photos()), prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and bool(scores.isfinite().all())


def test_verify_finds_nothing_wrong_with_it(config: Any) -> None:
    checks = check_reward(config.name, config, "cpu", "float32", None)
    assert not [check for check in checks if check.state == "different"]
    assert any(check.check == "opens" for check in checks)


def test_depends_on_picture_and_on_the_prompt_if_it_says_so(config: Any, prompts: Any) -> None:
    images, reward = as_images(photos()), config.load()
    scores = reward(images, prompts)
    assert (scores - reward(images.flip(0), prompts))[[0, 2]].abs().min() > 1e-3
    with_others = reward(images, prompts[::-1])
    if config.reads_prompt:
        assert (scores - with_others)[[0, 2]].abs().min() > 1e-3
    else:
        assert torch.equal(scores, with_others)


def test_same_input_same_score(config: Any, prompts: Any) -> None:
    images = as_images(photos())
    assert torch.equal(config.load()(images, prompts), config.load()(images, prompts))


def test_samples_are_independent(config: Any, prompts: Any) -> None:
    """Alone or among others, in value and in gradient."""
    reward = config.load(dtype="float64")
    images = as_images(photos(), torch.float64)
    together = reward(images, prompts)
    alone = torch.cat([config.load(dtype="float64")(images[b : b + 1], prompts[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
    if not config.differentiable:
        return  # there is no gradient to be independent
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, prompts)[1], images)
    assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()


def test_gradient_is_finite_and_reaches_every_sample(config: Any, prompts: Any) -> None:
    if not config.differentiable:
        pytest.skip("declared not differentiable")
    images = as_images(photos()).requires_grad_()
    (gradient,) = torch.autograd.grad(config.load()(images, prompts).sum(), images)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-6


def test_gradient_against_finite_differences(case: Case, config: Any, prompts: Any) -> None:
    """Along random directions, in float64: central differences, error O(h^2)."""
    if not config.differentiable:
        pytest.skip("declared not differentiable")
    reward, h = config.load(dtype="float64"), case.step
    images = (0.1 + 0.8 * as_images(photos(), torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (reward(images + h * direction, prompts) - reward(images - h * direction, prompts)) / (2 * h)
        along = (gradient * direction).sum(dim=(1, 2, 3))
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)


def test_weights_are_frozen(case: Case, config: Any, prompts: Any) -> None:
    if case.weightless:
        pytest.skip("has no weights of ours")
    reward = config.load()
    images = as_images(photos()).requires_grad_()
    scores = reward(images, prompts)
    assert scores.requires_grad == config.differentiable, "a score carries a gradient just where that is declared"
    if config.differentiable:
        scores.sum().backward()
    assert not reward.model.training
    assert all(not weight.requires_grad and weight.grad is None for weight in reward.model.parameters())


def test_agrees_with_pillow_on_picture_files(case: Case, config: Any, prompts: Any) -> None:
    reward, pictures = config.load(), photos()
    difference = (reward(as_images(pictures), prompts) - reward.score_pil(pictures, prompts)).abs().max()
    assert difference <= case.pillow_tolerance
    assert difference > 0 or case.weightless or not config.differentiable, "a number read from a text comes in steps"


@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_a_strip_is_refused_with_its_place(case: Case, config: Any, prompts: Any, size: tuple[int, int]) -> None:
    if case.weightless:
        pytest.skip("has no preprocessing of ours")
    files = [photos()[0], Image.new("RGB", size)]
    with pytest.raises(UnfitImage, match=r"image 2: \d+ x \d+ pixels: one edge is over 200 times"):
        config.load().score_pil(files, prompts[:2])


def test_bfloat16_weights_give_float32_scores(case: Case, config: Any, prompts: Any) -> None:
    if case.weightless:
        pytest.skip("has no weights of ours")
    images = as_images(photos())
    rough, exact = config.load(dtype="bfloat16")(images, prompts), config.load()(images, prompts)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact) or not config.differentiable, "a number read from a text comes in steps"
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_swallowed(config: Any, prompts: Any, pixel: float) -> None:
    images = as_images(photos())
    images[1, 0, 16, 16] = pixel
    scores = config.load()(images, prompts)
    assert scores.isfinite().tolist() == [True, False, True]


MISTAKES = {
    "one image without batch": (torch.zeros(3, 33, 40), PROMPTS, r"shape \[3, 33, 40\]; expected \[B, 3, H, W\]"),
    "channels last": (torch.zeros(3, 33, 40, 3), PROMPTS, r"expected \[B, 3, H, W\]"),
    "empty batch": (torch.zeros(0, 3, 33, 40), [], "nothing empty"),
    "8 bits": (torch.zeros(3, 3, 33, 40, dtype=torch.uint8), PROMPTS, "divide 8-bit images by 255"),
    "minus one to one": (torch.zeros(3, 3, 33, 40) - 0.5, PROMPTS, r"\[-0.5, -0.5\]; expected \[0, 1\]"),
    "0 to 255": (torch.full((3, 3, 33, 40), 200.0), PROMPTS, r"\[200, 200\]; expected \[0, 1\]"),
    "too few prompts": (torch.zeros(3, 3, 33, 40), PROMPTS[:2], "3 images and 2 prompts"),
    "a string of the right length": (torch.zeros(3, 3, 33, 40), "abc", "one string"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(config: Any, mistake: str) -> None:
    images, prompts, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as raised:
        config.load()(images, prompts)
    assert config.name in str(raised.value)

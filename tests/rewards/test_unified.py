"""UnifiedReward beyond the contracts: reading the number, counted failures, both prompts, and folders to be refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import leapalign.rewards
from leapalign.errors import UserError
from leapalign.rewards.qwen_vl import IMAGE_TOKEN, PLACEHOLDER, QwenPreprocess, read_template
from leapalign.rewards.unified import UnifiedReward
from leapalign.rewards.unified.model import MAX_PIXELS, MIN_PIXELS, UnifiedJudge, parse
from tiny_qwen import ANSWER, write_tiny_unified

FOLDER = Path(leapalign.rewards.__path__[0])
PROMPTS = ["a red circle", "two blue star"]
PUBLISHED = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\nStyle Score (1-5): 2.8"
WORDS = 'Word-wise Scores: [["red", 0.21], ["[No_mistakes]", 0.9]]\n\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_unified(tmp_path)


def judge(folder: Path, **fields: Any) -> UnifiedJudge:
    return UnifiedReward(path=str(folder), **{"max_new_tokens": 1} | fields).load()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (PUBLISHED, (2.694700002670288, 2.371500015258789, 2.8)),
        (WORDS + PUBLISHED, (2.694700002670288, 2.371500015258789, 2.8)),
        ("Alignment Score (1-5):4\nCoherence Score (1-5):\n 5\nStyle Score (1-5): 5.0/5", (4, 5, 5)),
        ("Alignment Score (1-5): X\nAlignment Score (1-5): 3.\nStyle Score (1-5): 0", (3, None, 0)),
        ("Alignment Score (1-5): 2\nAlignment Score (1-5): 4", (2, None, None)),
        ("Alignment Score (1-5): 45\nCoherence Score (1-5): 5.5\nStyle Score (1-5): 3,5", (None, None, None)),
        ("Alignment Score (1-5): -2\nCoherence Score (1-5): four\nStyle Score (1-5): nan", (None, None, None)),
        ("Alignment Score: 4\ncoherence score (1-5): 4\nStyle Score (1-5) 4", (None, None, None)),
        ("Alignment Score (1-5): 1.2.3\nCoherence Score (1-5): \u0664\nStyle Score (1-5): 1e9", (None, None, 1)),
        ("", (None, None, None)),
    ],
)
def test_the_number_is_read_or_nan(text: str, numbers: tuple[float | None, ...]) -> None:
    for axis, number in zip(("Alignment", "Coherence", "Style"), numbers):
        found = parse(text, axis)
        assert math.isnan(found) if number is None else found == number, (axis, found)


def test_gibberish_is_nan_and_counted(tmp_path: Path) -> None:
    reward = judge(write_tiny_unified(tmp_path, talks=False), max_new_tokens=6)
    images = torch.rand(2, 3, 40, 50)
    assert reward.failures == 0
    assert reward(images, PROMPTS).isnan().all() and reward.failures == 2
    picture = Image.fromarray((images[0] * 255).byte().permute(1, 2, 0).numpy())
    assert reward.score_pil([picture], PROMPTS[:1]).isnan().all() and reward.failures == 3


def test_what_is_understood_is_not_counted_nor_is_a_broken_picture(folder: Path) -> None:
    reward, images = judge(folder), torch.rand(2, 3, 40, 50)
    images[1, 0, 3, 3] = math.nan
    assert reward(images, PROMPTS).isnan().tolist() == [False, True] and reward.failures == 0


def test_each_aspect_reads_its_own_line(folder: Path) -> None:
    """The tiny model's answers: coherence is 6 - alignment, style 3 + (alignment - 1) / 5."""
    images = torch.rand(2, 3, 40, 50)
    alignment = judge(folder)(images, PROMPTS)
    torch.testing.assert_close(judge(folder, aspect="quality")(images, PROMPTS), 6 - alignment)
    style = judge(folder, aspect="quality", quality="style")(images, PROMPTS)
    torch.testing.assert_close(style, 3 + (alignment - 1) / 5)


def test_an_answer_that_was_cut_loses_its_last_line(folder: Path) -> None:
    """Half a number is a wrong number: 2 of 2.69."""
    reward = judge(folder, aspect="quality", quality="style")
    (picture,) = reward.preprocess(torch.rand(1, 3, 40, 50))
    answers = [ANSWER.format(4.2, 3.1, 2.69)[:-3], ANSWER.format(4.2, 3.1, 2.69)]
    for cut, whole in ((True, False), (False, True)):
        for text in answers:
            speak(reward, text, ends=whole)
            assert reward.answer(picture, "x") == (text.rpartition("\n")[0] if cut else text)
    speak(reward, answers[0], ends=False)
    assert math.isnan(reward.score(picture, "x"))
    speak(reward, answers[0], ends=True)
    assert reward.score(picture, "x") == 2.0


def speak(reward: UnifiedJudge, text: str, *, ends: bool) -> None:
    """The model's `generate` answers `text`."""
    tokenizer = reward.chat.tokenizer
    new = tokenizer(text, add_special_tokens=False)["input_ids"] + ends * [min(reward.end_tokens())]
    reward.model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([new])], dim=1)  # type: ignore


def test_generation_is_greedy_in_two_dimensional_positions(folder: Path) -> None:
    """Token by token through the model's own forward, on inputs as transformers' processor makes them."""
    reward = judge(folder, max_new_tokens=3)
    (picture,) = reward.preprocess(torch.rand(1, 3, 90, 140))
    assert picture.grid == (1, 6, 10)
    ids = reward.chat("a red circle", picture.num_tokens)[None]
    by_hand = ids
    for _ in range(3):
        with torch.no_grad():
            logits = reward.model(**reward.inputs(by_hand, picture)).logits
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
    text = reward.chat.tokenizer.decode(by_hand[0, ids.shape[1] :])
    assert reward.answer(picture, "a red circle") == text.rpartition("\n")[0]


@pytest.mark.parametrize(
    ("version", "digest"),
    [
        ("1", "24e356f7a0d5e89823505400ad8ff26daacee9c57428058716502a675acca9a6"),
        ("2", "6eefc0130da5c0f1c8ccbb470c806ba6f0343bbba3eaf38b0ef635f686d42b25"),
    ],
)
def test_prompts_are_the_published_ones_in_qwens_chat(folder: Path, version: Any, digest: str) -> None:
    text = read_template(FOLDER / f"unified/prompt_{version}.txt")
    before, after = (
        read_template(FOLDER / "hpsv3/prompt.txt").split(IMAGE_TOKEN)[0],
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    frame = before + IMAGE_TOKEN + "<|vision_end|>"
    assert text.startswith(frame) and text.endswith(after) and text.count(PLACEHOLDER) == 1
    assert hashlib.sha256(text.removeprefix(frame).removesuffix(after).encode()).hexdigest() == digest
    assert judge(folder, version=version).chat.template == text


def test_pixel_limits_come_from_the_processor_file(folder: Path) -> None:
    assert judge(folder).preprocess == QwenPreprocess(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    own = QwenPreprocess(min_pixels=3136, max_pixels=12544)
    flat = {"min_pixels": 3136, "max_pixels": 12544}
    nested = {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 12544}}}
    for file, content in (("processor_config.json", nested), ("preprocessor_config.json", flat)):
        (folder / file).write_text(json.dumps(content))
        assert judge(folder).preprocess == own
    for wrong in ({"resample": 2}, {"image_mean": [0.5, 0.5, 0.5]}, {"min_pixels": 12, "max_pixels": 1200}):
        (folder / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"is not Qwen2\.5-VL's"):
            judge(folder)


def test_wrong_folders_and_numbers_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json at 'nowhere/at-all'; expected .*Qwen2_5_VLFor"):
        judge(Path("nowhere/at-all"))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        UnifiedReward(max_new_tokens=0)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["temporal_patch_size"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="temporal_patch_size is 1 in"):
        judge(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(UserError, match="is a 'qwen3_vl' model; expected 'qwen2_5_vl'"):
        judge(folder)

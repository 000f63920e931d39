"""The judge of written text: edit distance against a second derivation, and RapidOCR on drawn words."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from drawn_text import FONTS, drawn, needs_ocr
from leapalign.errors import UserError
from leapalign.evaluation.text_accuracy import TextAccuracy, TextJudge, accuracy, edit_distance
from leapalign.images import to_tensor

WORDS = ("Hello", "LEAP", "reward", "Stop here", "noon book", "open")


def canvas(word: str, font: str = FONTS[0]) -> Tensor:
    """A word somewhere in a larger picture [3, 160, 400]."""
    picture, text = Image.new("RGB", (400, 160), (200, 220, 240)), drawn(word, font, paper=220)
    picture.paste(text, (30, 40))
    return to_tensor(picture)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_recursion_of_its_definition(a: str, b: str) -> None:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == distance(len(a), len(b))


def test_accuracy() -> None:
    assert accuracy("open", "open") == 1 and accuracy("", "open") == 0 and accuracy("xyz!", "open") == 0
    assert accuracy("opem", "open") == 0.75 and accuracy("openness", "open") == 0.5
    assert accuracy(["stop", "there"], ["stop", "here"]) == 0.5


def test_what_counts() -> None:
    characters = TextJudge(config=TextAccuracy(), engine=None)
    assert characters.compare("STOP he re", "Stop here") == 1
    assert TextJudge(config=TextAccuracy(ignore_case=False), engine=None).compare("stop", "Stop") == 0.75
    words = TextJudge(config=TextAccuracy(level="word"), engine=None)
    assert words.compare("stop here", "Stop here") == 1 and words.compare("stop he re", "Stop here") < 0.5


def test_without_the_packages_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'leapalign\[ocr\]'"):
        TextAccuracy().load()


@needs_ocr
def test_reads_drawn_words_in_larger_pictures() -> None:
    judge = TextAccuracy(ignore_case=False).load()
    prompts = [f'a sign that says "{word}"' for word in WORDS]
    images = torch.stack([canvas(word) for word in WORDS])
    assert judge(images, prompts).tolist() == [1.0] * len(WORDS)
    wrong = judge(images, [*prompts[1:], prompts[0]])
    assert wrong.dtype == torch.float32 and wrong.max() < 0.5


@needs_ocr
@pytest.mark.parametrize("font", FONTS)
def test_without_detector_the_picture_is_one_line(font: str) -> None:
    judge = TextAccuracy(detect=False, level="word", ignore_case=False).load()
    for word in WORDS:
        image = to_tensor(drawn(word, font))[None]
        assert judge.read(image) == [word] and judge(image, [f'"{word}"']).tolist() == [1.0]


@needs_ocr
def test_empty_broken_and_unquoted() -> None:
    judge = TextAccuracy().load()
    grey = torch.full((2, 3, 64, 256), 0.5)
    assert judge.read(grey) == ["", ""] and judge(grey, ['"a"', '"b"']).tolist() == [0, 0]
    grey[1, 0, 3, 3] = torch.nan
    assert judge(grey, ['"a"', '"b"']).isnan().tolist() == [False, True]
    with pytest.raises(UserError, match="quotes no words"):
        judge(grey, ['"a"', "none"])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        judge(grey, ['"a"'])

"""Accuracy of quoted text in images: RapidOCR reads it, and the reading is compared by edit distance.

RapidOCR runs PaddleOCR's networks (PP-OCRv6 small, in the wheel, offline) by onnxruntime: a detector of text boxes and
a recogniser unrelated to that of `leapalign.rewards.ocr`, so it can judge models trained with that reward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.images import to_pil
from leapalign.rewards.base import check_inputs
from leapalign.rewards.ocr.quotes import quoted_text


@dataclass(frozen=True, kw_only=True)
class TextAccuracy:
    """1 - edit distance between what RapidOCR reads and what the prompt quotes, over the longer one's length; [0, 1].

    Code: RapidOCR, Apache-2.0; networks: PaddleOCR's, Apache-2.0 (MODEL_LICENSES.md in the wheel).
    """

    name: ClassVar[str] = "text_accuracy"
    differentiable: ClassVar[bool] = False

    level: Literal["character", "word"] = "character"
    """character: spaces do not count, since the detector splits lines at them or not. word: insertions, deletions and
    changes of whole words."""
    ignore_case: bool = True
    """As usual in the literature. The reward `ocr` tells capitals apart."""
    detect: bool = True
    """False: the whole image is one line of text, which the recogniser sees without the detector."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> TextJudge:
        """onnxruntime chooses neither device nor dtype here: it runs on the CPU, in float32."""
        if importlib.util.find_spec("rapidocr") is None or importlib.util.find_spec("onnxruntime") is None:
            raise UserError(f"{self.name}: rapidocr or onnxruntime is missing; pip install 'leapalign[ocr]'")
        from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]

        # Flags given to a call would stay for the next ones, so each judge has its own engine.
        flags = {"Global.use_det": self.detect, "Global.use_cls": False, "Global.log_level": "error"}
        return TextJudge(config=self, engine=RapidOCR(params=flags))


@dataclass(frozen=True, kw_only=True)
class TextJudge:
    """Scores images [B, 3, H, W] in [0, 1] without gradient; NaN for an image that is not finite."""

    config: TextAccuracy
    engine: Any  # rapidocr.RapidOCR, whose package has no types for its answers

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Accuracies [B] float32 on the images' device."""
        check_inputs(self.config.name, images, prompts)
        wanted = [quoted_text(self.config.name, prompt) for prompt in prompts]
        scores = torch.tensor([self.compare(*pair) for pair in zip(self.read(images), wanted)], device=images.device)
        return scores.where(images.detach().isfinite().all(dim=(1, 2, 3)), torch.nan)

    def read(self, images: Tensor) -> list[str]:
        """Read the text of each image, its boxes from top to bottom and left to right; "" for none."""
        answers = [self.engine(to_pil(image)) for image in images.nan_to_num()]
        return [" ".join(answer.txts or ()).strip() for answer in answers]

    def compare(self, read: str, wanted: str) -> float:
        """Accuracy of a reading."""
        if self.config.ignore_case:
            read, wanted = read.casefold(), wanted.casefold()
        if self.config.level == "word":
            return accuracy(read.split(), wanted.split())
        return accuracy("".join(read.split()), "".join(wanted.split()))


def accuracy(read: Sequence[str], wanted: Sequence[str]) -> float:
    """1 - edit distance / length of the longer sequence; `wanted` is not empty."""
    return 1 - edit_distance(read, wanted) / max(len(read), len(wanted))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and changes that make `a` into `b`."""
    row = list(range(len(b) + 1))  # from the first i items of a to the first j of b
    for i, x in enumerate(a, start=1):
        before, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]

"""Inputs of Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, 2502.13923): an image as patches, a chat text as ids.

An image is resized to whole blocks of 28 x 28 pixels and cut into patches of 14 x 14, ordered so that each four form
one token. The tensor path is differentiable; the Pillow path reproduces published scores of image files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from leapalign.errors import UserError
from leapalign.images import to_tensor
from leapalign.rewards import preprocess
from leapalign.rewards.base import UnfitImage
from leapalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, check_ratio, normalise

PATCH, MERGE, FRAMES = 14, 2, 2  # pixels; patches per token edge; a still image is repeated as two frames
BLOCK = PATCH * MERGE  # pixels per token edge
PLACEHOLDER, IMAGE_TOKEN = "{text_prompt}", "<|image_pad|>"


@dataclass(frozen=True, kw_only=True)
class Patches:
    """One image: normalised patches [N, 3 * 2 * 14 * 14] and its grid (1, height, width) in patches."""

    values: Tensor
    grid: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        return len(self.values) // MERGE**2


@dataclass(frozen=True, kw_only=True)
class QwenPreprocess:
    """Resize to an area of about min_pixels to max_pixels, normalise, cut into patches."""

    min_pixels: int
    max_pixels: int

    def __call__(self, images: Tensor) -> list[Patches]:
        """Cut float images [B, 3, H, W] in [0, 1] into patches, differentiable, at least float32."""
        images = images if images.dtype == torch.float64 else images.float()  # as in leapalign.rewards.preprocess
        return self._patches(preprocess.resize(images, self._resized(images.shape[-2:])))

    def from_pil(self, image: Image.Image) -> Patches:
        """Cut an 8-bit image into patches by the reference path: resized by Pillow to 8 bits."""
        image = image.convert("RGB")
        height, width = self._resized((image.height, image.width))
        return self._patches(to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))[None])[0]

    def _resized(self, shape: Sequence[int]) -> tuple[int, int]:
        return smart_resize(shape[0], shape[1], self.min_pixels, self.max_pixels)

    def _patches(self, images: Tensor) -> list[Patches]:
        grid = (1, images.shape[-2] // PATCH, images.shape[-1] // PATCH)
        return [Patches(values=v, grid=grid) for v in patchify(normalise(images, CLIP_MEAN, CLIP_STD))]


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) in multiples of 28 with an area in [min_pixels, max_pixels] and about the same ratio.

    The order of float operations matters: 768 x 768 becomes 420 x 420 at 448 * 448 pixels, because
    768 / sqrt(768 * 768 / 448 / 448) is just below 448. Raises UnfitImage for images too narrow for a block.
    """
    check_ratio(height, width)
    size = [max(BLOCK, round(edge / BLOCK) * BLOCK) for edge in (height, width)]  # Python rounds halves to even
    if size[0] * size[1] > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        size = [math.floor(edge / scale / BLOCK) * BLOCK for edge in (height, width)]
    elif size[0] * size[1] < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        size = [math.ceil(edge * scale / BLOCK) * BLOCK for edge in (height, width)]
    if 0 in size:
        raise UnfitImage(f"{width} x {height} pixels: at {max_pixels} pixels its short edge vanishes; crop it first")
    return size[0], size[1]


def patchify(images: Tensor) -> Tensor:
    """Cut [B, 3, H, W] into [B, N, 3 * 2 * 14 * 14]: tokens row by row, the 2 x 2 patches of a token adjacent."""
    batch, channels, height, width = images.shape
    rows, columns = height // BLOCK, width // BLOCK
    blocks = images.reshape(batch, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, 2, 2, 3, 14, 14]
    frames = patches.unsqueeze(6).expand(*patches.shape[:6], FRAMES, PATCH, PATCH)
    return frames.reshape(batch, rows * columns * MERGE**2, -1)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat template with a placeholder: a prompt and a number of image tokens -> ids."""

    tokenizer: Any  # transformers has no common public type
    template: str

    def __call__(self, prompt: str, num_tokens: int) -> Tensor:
        """Return ids [L]; the template's image token is repeated `num_tokens` times."""
        text = fill(self.template, without_tokens(prompt, self.tokenizer.get_added_vocab()))
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return repeat_token(ids, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), num_tokens)


def read_template(file: Path) -> str:
    """Read a chat template exactly: trailing spaces and line ends belong to it."""
    return file.read_bytes().decode("utf-8")


def fill(template: str, prompt: str) -> str:
    """Replace the placeholder without str.format, because a prompt may hold braces."""
    return template.replace(PLACEHOLDER, prompt)


def without_tokens(prompt: str, tokens: Iterable[str]) -> str:
    """Remove the texts of special tokens from the prompt; they could end the turn or stand for an image."""
    pattern = "|".join(re.escape(token) for token in tokens)
    while pattern and (shorter := re.sub(pattern, "", prompt)) != prompt:
        prompt = shorter  # removing one can form another: <|im_<|im_end|>end|>
    return prompt


def repeat_token(ids: Tensor, token: int, times: int) -> Tensor:
    """Repeat each `token` in ids [L]: [L + (times - 1) * occurrences]."""
    return ids.repeat_interleave(torch.where(ids == token, times, 1))


def check_tokens(name: str, folder: str, tokenizer: Any, template: str, image_token_id: int) -> None:
    """Raise UserError unless each <|…|> of the template is a single token and the image token is the model's."""
    known, needed = tokenizer.get_added_vocab(), sorted(set(re.findall(r"<\|\w+\|>", template)))
    missing = [token for token in needed if token not in known]
    if missing:
        raise UserError(
            f"{name}: the tokenizer at {folder} lacks the special tokens {', '.join(missing)}; "
            f"name the folder of the Qwen-VL model as `processor` (--reward {name}=PATH,processor=FOLDER)"
        )
    if known[IMAGE_TOKEN] != image_token_id:
        raise UserError(
            f"{name}: {IMAGE_TOKEN} is {known[IMAGE_TOKEN]} for the tokenizer at {folder} and {image_token_id} for the "
            "model's config.json; give both from one Qwen-VL folder"
        )


def check_vision(name: str, folder: str, vision: dict[str, Any]) -> None:
    """Raise UserError unless config.json has the patch sizes of this module."""
    for key, value in (("patch_size", PATCH), ("spatial_merge_size", MERGE), ("temporal_patch_size", FRAMES)):
        if vision.get(key, value) != value:
            raise UserError(
                f"{name}: {key} is {vision[key]} in config.json at {folder}; only Qwen-VL's {value} is known"
            )

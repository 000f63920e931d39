"""Resize, crop or pad, and normalise an image as a reward network expects: differentiably on tensors, and by Pillow.

The tensor path (`F.interpolate`, bicubic, antialiased, not clamped) equals torchvision's resize of a float tensor bit
for bit and is differentiable. The Pillow path reproduces published scores of image files; it rounds to 8 bits and clips
overshoot, so the two differ by 0.2 to 0.3 levels of 255 on average and by up to 20 at strong edges. Without
antialiasing the error would be 7 to 10 levels on average.

Departure: open_clip returns a non-square image whose longer side is already the target unpadded; here it is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from leapalign.images import to_tensor
from leapalign.rewards.base import UnfitImage

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue of CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_RATIO = 200  # longer / shorter edge; Qwen2-VL's limit, used for all rewards

T = TypeVar("T")
Rounding = Literal["floor", "half-even"]
Fit = Literal["crop", "pad"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize to `resize`, crop or pad to `size` x `size`, normalise.

    `fit="crop"`: the shortest edge becomes `resize`, then centre crop (CLIP, PickScore, ImageReward).
    `fit="pad"`: the longest edge becomes `resize`, zeros (black) pad the rest (HPSv2).
    `rounding` of an odd remainder: "floor" as in transformers, "half-even" (Python's round) as in torchvision.
    """

    size: int  # pixels, side of the network's square input
    resize: int = 0  # pixels; 0: the same as size
    fit: Fit = "crop"
    rounding: Rounding = "floor"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess float images [B, 3, H, W] in [0, 1]: [B, 3, size, size], differentiable, at least float32."""
        # CPUs have no antialiased resize in half precision, and bfloat16 is coarser than 1/255
        images = images if images.dtype == torch.float64 else images.float()
        return normalise(self._fit(resize(images, self._resized(images.shape[-2:]))), self.mean, self.std)

    def from_pil(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess 8-bit images by the reference path, Pillow's: [B, 3, size, size] float32, no gradient."""
        return normalise(torch.stack(each(images, self.resized)), self.mean, self.std)

    def resized(self, image: Image.Image) -> Tensor:
        """Resize one image, then crop or pad it: float32 [3, size, size] in [0, 1]."""
        image = image.convert("RGB")
        height, width = self._resized((image.height, image.width))
        return self._fit(to_tensor(image.resize((width, height), Image.Resampling.BICUBIC)))

    def _resized(self, shape: Sequence[int]) -> tuple[int, int]:
        check_ratio(*shape)
        target = self.resize or self.size
        return longest_edge(shape, target) if self.fit == "pad" else shortest_edge(shape, target)

    def _fit(self, images: Tensor) -> Tensor:
        return centre_pad(images, self.size) if self.fit == "pad" else centre_crop(images, self.size, self.rounding)


def each(images: Sequence[Image.Image], convert: Callable[[Image.Image], T]) -> list[T]:
    """Convert the images one by one; an `UnfitImage` gets the index of its image."""
    converted = []
    for index, image in enumerate(images):
        try:
            converted.append(convert(image))
        except UnfitImage as error:
            raise UnfitImage(error.problem, index) from None
    return converted


def check_ratio(height: int, width: int) -> None:
    """Raise UnfitImage for an extreme aspect ratio, where a resized edge would vanish or fill the memory."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UnfitImage(f"{width} x {height} pixels: one edge is over {MAX_RATIO} times the other; crop it first")


def shortest_edge(shape: Sequence[int], target: int) -> tuple[int, int]:
    """Return (height, width) with shorter edge `target`; the longer is rounded down in both conventions."""
    height, width = shape
    if height <= width:
        return target, int(target * width / height)
    return int(target * height / width), target


def longest_edge(shape: Sequence[int], target: int) -> tuple[int, int]:
    """Return (height, width) with longer edge `target`, rounded half to even (open_clip's ResizeMaxSize)."""
    scale = target / max(shape)
    height, width = (max(1, round(edge * scale)) for edge in shape)
    return height, width


def resize(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize [B, 3, H, W] to (height, width), bicubic and antialiased; overshoot at edges is kept."""
    return F.interpolate(images, size=shape, mode="bicubic", antialias=True, align_corners=False)


def crop_offset(length: int, size: int, rounding: Rounding) -> int:
    remainder = length - size
    return remainder // 2 if rounding == "floor" else round(remainder / 2)  # Python rounds halves to even


def centre_crop(images: Tensor, size: int, rounding: Rounding) -> Tensor:
    """Centre-crop [..., H, W] to [..., size, size]; both edges must be at least `size`."""
    top, left = (crop_offset(length, size, rounding) for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def centre_pad(images: Tensor, size: int) -> Tensor:
    """Zero-pad [..., H, W] to [..., size, size]; an odd pixel goes to the right and the bottom."""
    height, width = images.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    columns = images.new_tensor([mean, std])[:, :, None, None]  # [2, 3, 1, 1]
    return (images - columns[0]) / columns[1]

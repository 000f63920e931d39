"""The size of an image as a JPEG file, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import torch

from leapalign.images import to_pil
from leapalign.rewards.base import Reward, check_inputs, check_prompts

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class JPEGReward(Reward):
    """Minus kilobytes."""

    quality: int

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B] float32, without gradient; NaN for an image that is not finite."""
        check_inputs("jpeg", images, prompts)
        finite = images.detach().flatten(1).isfinite().all(1).tolist()
        sizes = [self.size(to_pil(image)) if good else torch.nan for image, good in zip(images.detach(), finite)]
        return images.new_tensor(sizes, dtype=torch.float32)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size: [N]."""
        check_prompts("jpeg", images, prompts)
        return torch.tensor([self.size(image) for image in images])

    def size(self, image: Image) -> float:
        file = BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=self.quality)
        return -file.tell() / 1000

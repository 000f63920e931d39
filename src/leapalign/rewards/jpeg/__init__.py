"""JPEG size (DDPO, arXiv 2305.13301, Sec. 4.2: compressibility): minus the kilobytes of the image as a JPEG file.

A reward without gradient and without weights: policy-gradient methods train on it, and what they find is seen at once.
With a negative weight it asks for images that are hard to compress.

Departures: the encoder is Pillow's, at its default subsampling; a kilobyte is 1000 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward

if TYPE_CHECKING:
    from leapalign.rewards.jpeg.model import JPEGReward


@dataclass(frozen=True, kw_only=True)
class JPEGSize(DescribedReward):
    """Minus the size of the image as a JPEG file, in kilobytes."""

    name: ClassVar[str] = "jpeg"
    differentiable: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False
    resolution: ClassVar[str] = "the image's own"
    prompt_length: ClassVar[str] = "not read"
    output_range: ClassVar[str] = "(-inf, 0): about -100 for 512 x 512 photos at quality 95"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on Pillow)"
    weights_licence: ClassVar[str] = "none: there are no weights"
    memory: ClassVar[str] = "none"

    quality: int = 95
    """Pillow's quality of the file, 1 to 95."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise UserError(f"jpeg: got quality={self.quality}, expected 1 to 95; try 95")

    def load(self, device: str = "cpu", dtype: str = "float32") -> JPEGReward:
        from leapalign.rewards.jpeg.model import JPEGReward

        return JPEGReward(quality=self.quality)

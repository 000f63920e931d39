"""Images to look at: enlarged without smoothing, in grids, and with a detector's verdicts drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from leapalign.images import to_levels, to_pil

if TYPE_CHECKING:
    from leapalign.evaluation.statistics import Evaluation

PAPER, INK, RIGHT, WRONG = (255, 255, 255), (40, 40, 44), (22, 128, 60), (190, 30, 45)


def enlarged(image: Tensor, scale: int) -> Image.Image:
    """Enlarge every pixel to a square of `scale` × `scale`."""
    return Image.fromarray(to_levels(image).repeat(scale, 0).repeat(scale, 1))


def data_uri(image: Tensor) -> str:
    """Encode the pixels as a PNG data URI; the page enlarges it without smoothing."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grid(images: Sequence[Tensor], columns: int, scale: int, gap: int = 4) -> Image.Image:
    """Join images [3, H, W] of one size to one sheet, row by row."""
    tiles = [enlarged(image, scale) for image in images]
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def draw_verdicts(evaluation: Evaluation, rows: Sequence[int], columns: int = 10, scale: int = 5) -> Image.Image:
    """Draw the images `rows` with their prompt, every detection's box, name and score, and the verdict."""
    font = _font(10)
    height, width = evaluation.images[rows[0]].shape[-2:]
    cell = (max(width * scale, 190) + 8, height * scale + 46)
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left, top = place % columns * cell[0] + 4, place // columns * cell[1] + 4
        _caption(draw, evaluation, row, left, top, font)
        sheet.paste(enlarged(evaluation.images[row], scale), (left, top + 28))
        for d in evaluation.detections[row]:
            x0, y0, x1, y1 = (v * scale for v in d.box)
            paint = INK if d.score > 0.3 else (150, 150, 150)
            draw.rectangle((left + x0, top + 28 + y0, left + x1, top + 28 + y1), outline=paint)
            text = f"{d.color or ''} {d.label} {d.score:.2f}".strip()
            wide = draw.textlength(text, font=font)
            at = (left + min(x0, cell[0] - 8 - wide), top + 28 + min(y1, height * scale - 12))
            draw.rectangle(draw.textbbox(at, text, font=font), fill=PAPER)
            draw.text(at, text, fill=paint, font=font)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, evaluation: Evaluation, row: int, left: int, top: int, font) -> None:
    verdict = evaluation.verdicts[row]
    draw.text((left, top), evaluation.prompts[row].text.removeprefix("a photo of "), fill=INK, font=font)
    text = f"{row}: right" if verdict.correct else f"{row}: {', '.join(verdict.reasons)}"
    draw.text((left, top + 13), text, fill=RIGHT if verdict.correct else WRONG, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's DejaVu Sans, which is the same on every machine."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)

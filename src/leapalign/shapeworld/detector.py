"""ShapeWorld's detector: finds coloured shapes by comparing pixels with templates.

Each pixel is decomposed into background and palette colour; connected patches of one colour are compared with the
coverage of every shape at every sub-pixel position and size. The score is a product of factors from 0 (clearly no) to 1
(clearly yes): the best shape fits, it fits better than the second best, its edges are sharp, it has one palette colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy import ndimage

from leapalign.geneval.rules import Detection
from leapalign.shapeworld.world import COLORS, GROUND, SHAPES, SIZE, coverage

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 20  # side of the compared window
EXTENT = {"square": 0.9, "triangle": 0.95, "diamond": 1.1}  # half a side of the box over the radius; else 1
SOFTNESS = 0.45  # pixels; edges of decoded images are slightly softer than rendered ones
RADII = np.arange(4.2, 7.01, 0.2)  # the first only for what is smaller than the world's smallest shape, of 4.8
SHIFTS = np.arange(-1.25, 1.26, 0.25)
BLUR = 0.9  # pixels; blur of a template whose edges are no longer sharp
MIN_AREA = 15  # pixels; the smallest shape has about 40
MAX_SIDE = 15  # pixels; a longer patch is taken for two touching shapes
MAX_CONTACT = 5  # pixels; a longer seam is not where two shapes touch

# (certainly yes, certainly no)
MISFIT = (0.040, 0.055)  # squared residual over the shape's own square: true shapes up to 0.02, blurred and noisy 0.03
MARGIN = (0.50, 0.68)  # misfit of the best shape over the second best's: true shapes up to 0.4, half-and-half 0.65 to 1
SOFT = (0.72, 0.80)  # residual over its sum with that of the blurred template: decoded shapes up to 0.45, blurred by
# σ = 0.7 pixels up to 0.72, by 1 pixel from 0.76
OFF_COLOR = (
    0.15,
    0.30,
)  # RGB distance of the patch's core from its palette colour; the palette's closest are 0.54 apart
IMPURE = (0.10, 0.25)  # fraction of core pixels further than OFF_COLOR's end from it


@dataclass(frozen=True)
class Blob:
    """A connected patch of one colour: its fraction of each pixel, cropped around its centre."""

    image: int
    color: str
    off_color: float
    impure: float
    share: np.ndarray  # [PATCH, PATCH]
    inside: np.ndarray  # [PATCH, PATCH] 1 within the image
    outside: float  # squared fraction outside of the window
    left: int  # position of the window in the image
    top: int


def unmix(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[3, H, W] -> nearest mixture of ground and one palette colour: the colour's index and fraction [H, W]."""
    ground = np.asarray(GROUND, np.float32)
    tint = np.asarray(list(COLORS.values()), np.float32) - ground  # [C, 3]
    pixel = image.transpose(1, 2, 0) - ground  # [H, W, 3]
    share = np.clip(pixel @ tint.T / (tint**2).sum(1), 0, 1)  # [H, W, C]
    miss = np.square(pixel[:, :, None] - share[..., None] * tint).sum(-1)
    color = miss.argmin(-1)
    return color, np.take_along_axis(share, color[..., None], -1)[..., 0]


def cut(mask: np.ndarray) -> list[np.ndarray]:
    """Split a patch that is too long for one shape where it is thinnest; repeat until all pieces are short enough."""
    rows, columns = np.nonzero(mask)
    for axis, at in ((1, columns), (0, rows)):
        length = at.max() - at.min() + 1
        if length > MAX_SIDE:
            middle = np.arange(at.min() + length // 4, at.max() - length // 4 + 1)
            line = middle[mask.sum(1 - axis)[middle].argmin()]
            if mask.sum(1 - axis)[line] > MAX_CONTACT:
                continue
            first = np.zeros_like(mask)
            first[(slice(None), slice(line)) if axis else slice(line)] = True
            pieces = [piece for piece in (mask & first, mask & ~first) if piece.any()]
            return [smaller for piece in pieces for smaller in cut(piece)]
    return [mask]


def window(values: np.ndarray, left: int, top: int) -> np.ndarray:
    """Crop a PATCH × PATCH window of [H, W]; zero outside of the image."""
    padded = np.pad(values, PATCH)
    return padded[top + PATCH : top + 2 * PATCH, left + PATCH : left + 2 * PATCH]


def connected(mask: np.ndarray) -> list[np.ndarray]:
    labels = np.zeros(mask.shape, int)
    num = cast("int", ndimage.label(mask, output=labels))
    return [labels == i + 1 for i in range(num)]


def owners(pieces: list[np.ndarray], reach: float = 2.5) -> np.ndarray:
    """Each pixel's piece [H, W], -1 for none; soft edges within `reach` pixels go to the nearest piece."""
    owner = np.full(pieces[0].shape, -1)
    for i, piece in enumerate(pieces):
        owner[piece] = i
    far, nearest = cast("tuple", ndimage.distance_transform_edt(owner < 0, return_indices=True))
    return np.where(far <= reach, owner[tuple(nearest)], -1)


def blobs(image: np.ndarray, index: int) -> list[Blob]:
    """Find the patches of one colour in an image [3, H, W]."""
    color, share = unmix(image)
    patches = [(c, patch) for c in range(len(COLORS)) for patch in connected((share > 0.5) & (color == c))]
    pieces = [(c, piece) for c, patch in patches if patch.sum() >= MIN_AREA for piece in cut(patch)]
    pieces = [(c, piece) for c, piece in pieces if piece.sum() >= MIN_AREA]
    if not pieces:
        return []
    owner = owners([piece for _, piece in pieces])
    return [blob(image, index, c, share, piece, owner == i) for i, (c, piece) in enumerate(pieces)]


def blob(image: np.ndarray, index: int, color: int, share: np.ndarray, mask: np.ndarray, mine: np.ndarray) -> Blob:
    """Measure a piece `mask`; `mine` is the piece with its soft edge."""
    name = list(COLORS)[color]
    ground, paint = np.asarray(GROUND, np.float32)[:, None], np.asarray(COLORS[name], np.float32)[:, None]
    core = image[:, mask & (share > 0.9)] if (mask & (share > 0.9)).sum() >= 5 else image[:, mask]  # [3, n]
    middle = np.median(core, axis=1, keepdims=True)
    tint = middle - ground
    soft = np.clip(((image - ground[:, :, None]) * tint[:, :, None]).sum(0) / (tint**2).sum(), 0, 1) * mine
    rows, columns = np.nonzero(mask)
    left = round((columns.min() + columns.max() + 1) / 2) - PATCH // 2
    top = round((rows.min() + rows.max() + 1) / 2) - PATCH // 2
    return Blob(
        image=index,
        color=name,
        off_color=float(np.linalg.norm(middle - paint)),
        impure=float((np.linalg.norm(core - paint, axis=0) > OFF_COLOR[1]).mean()),
        share=window(soft, left, top),
        inside=window(np.ones_like(share), left, top),
        outside=float((soft**2).sum() - (window(soft, left, top) ** 2).sum()),
        left=left,
        top=top,
    )


@cache
def templates() -> tuple[np.ndarray, np.ndarray]:
    """Render every shape at every position and size: coverage [S, N, PATCH * PATCH], and (x, y, radius) [N, 3]."""
    grid = np.stack(np.meshgrid(SHIFTS + PATCH / 2, SHIFTS + PATCH / 2, RADII, indexing="ij"), -1).reshape(-1, 3)
    x, y, r = grid.T
    covers = np.stack([coverage(shape, x, y, r)[:, :PATCH, :PATCH] for shape in SHAPES])  # [S, N, PATCH, PATCH]
    soft = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(covers, SOFTNESS, 2, radius=2), SOFTNESS, 3, radius=2)
    return soft.reshape(len(SHAPES), len(grid), -1), grid


def fit(found: list[Blob]) -> tuple[np.ndarray, np.ndarray]:
    """Relative residual of each blob for each shape at its best position [B, S], and the best template [B, S]."""
    covers, _ = templates()
    share = np.stack([b.share.ravel() for b in found])  # [B, P]
    inside = np.stack([b.inside.ravel() for b in found])
    outside = np.array([[b.outside] for b in found])
    misfit, best = np.empty((len(found), len(SHAPES))), np.empty((len(found), len(SHAPES)), int)
    for s, cover in enumerate(covers):
        square = inside @ (cover**2).T  # [B, N]
        residual = ((share**2).sum(1)[:, None] + outside - 2 * share @ cover.T + square) / square
        best[:, s] = residual.argmin(1)
        misfit[:, s] = np.maximum(residual.min(1), 1e-4)
    return misfit, best


def softness(b: Blob, cover: np.ndarray) -> float:
    """Edge softness: 0 if the blob is exactly `cover` [PATCH * PATCH], 1 if exactly that blurred by BLUR."""
    blurred = ndimage.gaussian_filter(cover.reshape(PATCH, PATCH), BLUR)
    sharp, soft = (float(np.square(b.share - b.inside * each).sum()) for each in (cover.reshape(PATCH, PATCH), blurred))
    return sharp / (sharp + soft)


def surely(value: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Linear ramp: 1 below the first bound, 0 above the second."""
    return np.clip((bounds[1] - value) / (bounds[1] - bounds[0]), 0, 1)


def detection(b: Blob, misfit: np.ndarray, best: np.ndarray) -> Detection:
    order = misfit.argsort()
    first, second = misfit[order[0]], misfit[order[1]]
    covers, places = templates()
    soft = softness(b, covers[order[0], best[order[0]]])
    parts = ((first, MISFIT), (first / second, MARGIN), (soft, SOFT), (b.off_color, OFF_COLOR), (b.impure, IMPURE))
    x, y, r = places[best[order[0]]]
    half = r * EXTENT.get(SHAPES[order[0]], 1.0)
    box = (b.left + x - half, b.top + y - half, b.left + x + half, b.top + y + half)
    x0, y0, x1, y1 = (float(np.clip(v, 0, SIZE)) for v in box)
    score = float(np.prod([surely(np.asarray(value), bounds) for value, bounds in parts])) if r > RADII[0] else 0.0
    return Detection(SHAPES[order[0]], b.color, (x0, y0, x1, y1), score)


def detect(images: Tensor | np.ndarray) -> list[list[Detection]]:
    """[B, 3, 32, 32] in [0, 1] -> detections of each image, best first, without those of score 0."""
    pixels = np.asarray(images if isinstance(images, np.ndarray) else images.detach().float().cpu(), np.float32)
    if pixels.ndim != 4 or pixels.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"detect takes images [B, 3, {SIZE}, {SIZE}] in [0, 1]; got shape {list(pixels.shape)}")
    found = [b for i, image in enumerate(pixels) for b in blobs(image, i)]
    result: list[list[Detection]] = [[] for _ in pixels]
    for b, misfit, best in zip(found, *fit(found)) if found else ():
        if (d := detection(b, misfit, best)).score > 0:
            result[b.image].append(d)
    return [sorted(each, key=lambda d: -d.score) for each in result]

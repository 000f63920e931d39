"""ShapeWorld: up to four coloured shapes on a plain background, rendered from signed distances.

A scene is a board of 2 × 2 cells; each object has a cell of its own and a small random offset. The world is small
enough for a generator trained on a CPU and has all of GenEval's six tasks. Pixels: float32 in [0, 1], [B, 3, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIZE = 32  # pixels; every length below is in pixels of this size
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.15),
    "yellow": (0.98, 0.80, 0.05),
    "green": (0.10, 0.62, 0.25),
    "blue": (0.13, 0.33, 0.90),
    "purple": (0.62, 0.15, 0.75),
    "black": (0.08, 0.08, 0.10),
}
GROUND = (0.94, 0.94, 0.92)
CELLS = ((8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0))  # centres (x, y): top left, top right, bottom left, right
JITTER = 1.8
RADIUS = (4.8, 6.0)


@dataclass(frozen=True)
class Object:
    """A coloured shape: centre `x`, `y` from the top left and `radius`, half its extent, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[Object, ...]


def place(shape: str, color: str, cell: int, rng: np.random.Generator) -> Object:
    """Place an object in one of the four cells, with a small random offset and size."""
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    return Object(shape, color, CELLS[cell][0] + dx, CELLS[cell][1] + dy, rng.uniform(*RADIUS))


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """Signed distance in pixels to the outline, negative inside; exact on straight edges, approximate at corners."""
    import numpy as np

    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(ax, ay) - 0.9 * r
    if shape == "triangle":  # upright, as wide as it is high
        return np.maximum(dy - 0.95 * r, (2 * ax - dy - 0.95 * r) / np.sqrt(5.0))
    if shape == "diamond":
        return (ax + ay - 1.1 * r) / np.sqrt(2.0)
    if shape == "cross":
        return np.minimum(np.maximum(ax - r, ay - 0.34 * r), np.maximum(ax - 0.34 * r, ay - r))
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.74 * r) - 0.26 * r
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Fraction of each pixel that the shape covers: x, y, r [N] -> [N, size, size] in [0, 1]."""
    import numpy as np

    at = ((np.arange(size, dtype=np.float32) + 0.5) * SIZE / size).astype(np.float32)
    dx = at[None, None, :] - np.asarray(x, np.float32)[:, None, None]
    dy = at[None, :, None] - np.asarray(y, np.float32)[:, None, None]
    distance = signed_distance(shape, dx, dy, np.asarray(r, np.float32)[:, None, None])
    return np.clip(0.5 - distance * size / SIZE, 0.0, 1.0)


def render(scenes: list[Scene], size: int = SIZE) -> np.ndarray:
    """Render scenes, later objects over earlier ones -> float32 [B, 3, size, size] in [0, 1]."""
    import numpy as np

    images = np.empty((len(scenes), 3, size, size), np.float32)
    images[:] = np.asarray(GROUND, np.float32)[None, :, None, None]
    for slot in range(max((len(s) for s in scenes), default=0)):
        for shape in SHAPES:
            rows = [b for b, s in enumerate(scenes) if len(s) > slot and s[slot].shape == shape]
            if not rows:
                continue
            objects = [scenes[b][slot] for b in rows]
            x, y, r = (np.asarray([getattr(o, name) for o in objects]) for name in ("x", "y", "radius"))
            cover = coverage(shape, x, y, r, size)[:, None]
            color = np.asarray([COLORS[o.color] for o in objects], np.float32)[:, :, None, None]
            images[rows] = images[rows] * (1 - cover) + color * cover
    return images

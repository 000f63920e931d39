"""Badly drawn pictures: what a generator makes of a scene when it does not quite manage, or when it games a reward.

A picture is spoiled by a second scene that shows through, evenly, in stripes or in patches (two colours in one shape,
half a shape, a ghost of one shape too many), or by bending it until its shapes are none of the six. A reward that has
seen good drawings only is easily pleased by these; one that is told they are wrong holds against them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.shapeworld.world import CELLS, COLORS, SHAPES, SIZE, Object, Scene, place, render

BENT = 0.35  # share of pictures that are bent instead of mixed
BEND = (1.2, 2.0)  # pixels, standard deviation of the displacement
LEAST = 0.08  # squared distance from either scene, as a share of that between the two: less is not spoiled


def spoil(scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """-> pictures [B, 3, 32, 32] in [0, 1], and [B] whether each is really spoiled (a mask may miss the object)."""
    clean = torch.from_numpy(render(scenes))
    other = torch.from_numpy(render([edited(scene, rng) for scene in scenes]))
    mask = torch.from_numpy(np.stack([random_mask(rng) for _ in scenes]))[:, None]
    images = clean + mask * (other - clean)
    least = LEAST * squared_distance(other, clean)
    spoiled = (squared_distance(images, clean) > least) & (squared_distance(images, other) > least)
    rows = torch.from_numpy(rng.random(len(scenes)) < BENT)
    images[rows] = bend(clean[rows], rng)
    return images, spoiled | rows


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum((1, 2, 3))


def edited(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one object recoloured, reshaped or taken away, or with one more."""
    chosen = scene[rng.integers(len(scene))]
    rest = tuple(o for o in scene if o is not chosen)
    free = [i for i, (x, y) in enumerate(CELLS) if all(max(abs(o.x - x), abs(o.y - y)) > SIZE / 4 for o in scene)]
    shape, color = pick(SHAPES, chosen.shape, rng), pick(tuple(COLORS), chosen.color, rng)
    edit = rng.choice(["recolor", "reshape", "remove", "add"])
    if edit == "remove":
        return rest
    if edit == "add" and free:
        shape, color = rng.choice([chosen.shape, shape]), rng.choice([chosen.color, color])
        return (*scene, place(shape, color, free[rng.integers(len(free))], rng))
    if edit == "reshape":
        return (*rest, Object(shape, chosen.color, chosen.x, chosen.y, chosen.radius))
    return (*rest, Object(chosen.shape, color, chosen.x, chosen.y, chosen.radius))


def pick(choices: tuple[str, ...], besides: str, rng: np.random.Generator) -> str:
    others = [choice for choice in choices if choice != besides]
    return others[rng.integers(len(others))]


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """How much of the second scene shows, [32, 32] in [0, 1]: evenly, in stripes, or in patches."""
    kind = rng.choice(["even", "stripes", "patches"])
    if kind == "even":
        return np.full((SIZE, SIZE), rng.uniform(0.3, 0.7), np.float32)
    if kind == "stripes":
        at = (np.arange(SIZE) + 0.5) / SIZE
        turn, waves, phase = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 4), rng.uniform(0, 2 * np.pi)
        field = np.sin(2 * np.pi * waves * (np.cos(turn) * at[None] + np.sin(turn) * at[:, None]) + phase)
        return sigmoid(field * rng.uniform(2, 12))
    return sigmoid(smooth_fields(rng.normal(size=(1, 1, 6, 6)))[0, 0].numpy() * rng.uniform(2, 8))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def smooth_fields(coarse: np.ndarray) -> Tensor:
    return F.interpolate(torch.from_numpy(coarse.astype(np.float32)), size=(SIZE, SIZE), mode="bicubic")


def bend(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Move every pixel by a smooth random displacement."""
    num = len(images)
    strength = rng.uniform(*BEND, size=(num, 1, 1, 1))
    flow = smooth_fields(rng.normal(size=(num, 2, 7, 7)) * strength).permute(0, 2, 3, 1) * 2 / SIZE
    grid = F.affine_grid(torch.eye(2, 3).expand(num, 2, 3), list(images.shape), align_corners=False)
    bent = F.grid_sample(images, grid + flow, mode="bicubic", padding_mode="border", align_corners=False)
    return bent.clamp(0, 1)

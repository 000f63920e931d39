"""Training scenes: captions in the six tasks, and images of which a given fraction contradicts the caption.

Web captions are similar: named objects mostly exist, but numbers, colours next to other objects and above all positions
are often wrong. A generator trained on such pairs draws well and follows prompts only partly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leapalign.shapeworld import captions as c
from leapalign.shapeworld.world import CELLS, COLORS, SHAPES, Scene, render


@dataclass(frozen=True)
class Manners:
    """Composition of a training set: fraction of each task, and fraction of its images with a true caption."""

    share: dict[str, float]
    truthful: dict[str, float]


SLOPPY = Manners(  # as web captions are
    share={
        "single_object": 0.16,
        "two_object": 0.16,
        "counting": 0.17,
        "colors": 0.16,
        "position": 0.17,
        "color_attr": 0.18,
    },
    truthful={
        "single_object": 1.0,
        "two_object": 0.80,
        "counting": 0.50,
        "colors": 0.75,
        "position": 0.50,
        "color_attr": 0.50,
    },
)
STRICT = Manners(  # no false captions, more of the difficult ones
    share={
        "single_object": 0.10,
        "two_object": 0.12,
        "counting": 0.12,
        "colors": 0.10,
        "position": 0.28,
        "color_attr": 0.28,
    },
    truthful=dict.fromkeys(c.TASKS, 1.0),
)
LAYOUT = len(SHAPES) * (3 + len(COLORS))
POOLS = {tag: c.all_captions(tag) for tag in c.TASKS}


def random_caption(rng: np.random.Generator, manners: Manners = SLOPPY) -> c.Metadata:
    return c.draw(POOLS[str(rng.choice(c.TASKS, p=list(manners.share.values())))], rng)


def captioned_scene(caption: c.Metadata, rng: np.random.Generator, manners: Manners = SLOPPY) -> Scene:
    """Draw a scene for which the caption is true or, with the remaining probability, one of an adversarial negative."""
    if rng.random() < manners.truthful[caption["tag"]]:
        return c.scene_of(caption, rng)
    misses = c.near_misses(caption)
    if caption["tag"] == "position":
        misses = misses[:3]  # the right two objects, another relation
    if caption["tag"] == "counting":
        misses = [m for m in misses if m["include"][0]["class"] == caption["include"][0]["class"]]
    return c.scene_of(misses[rng.integers(len(misses))], rng)


def random_images(batch: int, seed: tuple[int, ...]) -> Tensor:
    """Render clean scenes of random captions -> [B, 3, 32, 32] in [0, 1]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render([c.scene_of(random_caption(rng), rng) for _ in range(batch)]))


def cell_labels(scene: Scene) -> np.ndarray:
    """[4, 2]: shape and colour number of the object in each cell, 0 for none."""
    labels = np.zeros((len(CELLS), 2), np.int64)
    for o in scene:
        cell = int(o.x > 16) + 2 * int(o.y > 16)
        labels[cell] = SHAPES.index(o.shape) + 1, list(COLORS).index(o.color) + 1
    return labels


def layout(scene: Scene) -> np.ndarray:
    """[LAYOUT]: for each shape its count, its mean position (x, y in -1..1), and its count in each colour."""
    values = np.zeros((len(SHAPES), 3 + len(COLORS)), np.float32)
    for i, shape in enumerate(SHAPES):
        mine = [o for o in scene if o.shape == shape]
        if mine:
            values[i, :3] = len(mine), np.mean([o.x / 8 - 2 for o in mine]), np.mean([o.y / 8 - 2 for o in mine])
        for o in mine:
            values[i, 3 + list(COLORS).index(o.color)] += 1
    return values.ravel()

"""Images between two scenes, and distorted ones, like those of a generator that fails or games a reward.

An image mixes a scene with an edited copy of it, evenly, in stripes or in patches: two colours in one shape, half a
shape, a faint extra shape. A reward trained on clean scenes only scores such images too high, and its gradient does not
lead from a wrong scene to the right one, because it has never seen images between them. Targets of the training:

- where the edit makes the caption false, the image is as good as its fraction of the true scene (`share`);
- where it does not (another colour, and none is named), both ends are good and mixtures are bad (`bad`);
- distorted images, whose shapes are none of the six, are bad.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.shapeworld.world import CELLS, COLORS, SHAPES, SIZE, Scene, place, render

BENT = 0.2  # fraction of images that are distorted instead of mixed
BEND = (1.2, 2.0)  # pixels, standard deviation of the displacement
OPEN_COLORS = ("single_object", "two_object", "counting", "position")
RECOLORED = 0.25  # fraction of their edits that recolour, more than an equal share
SWAPPED = 0.7  # fraction of edits that swap, if the caption is about positions or colours
LEAST = 0.08  # least fraction of either scene in an image that counts as mixed


@dataclass(frozen=True)
class Between:
    """One image per scene; all values in [0, 1]."""

    images: Tensor  # [B, 3, 32, 32]
    ends: Tensor  # [B, 3, 32, 32] the edited scenes, clean
    false: Tensor  # [B] True if the caption is false for the edited scene; False for distorted images
    true: Tensor  # [B] True if it is true for it
    share: Tensor  # [B] fraction of the true scene in the image, by squared distance; 1 for distorted ones
    bad: Tensor  # [B] True if the image is bad although both ends are good, or distorted


def between(captions: list[dict[str, Any]], scenes: list[Scene], rng: np.random.Generator) -> Between:
    """Make images between each scene, for which its caption is true, and an edit of it."""
    edits = [edited(caption, scene, rng) for caption, scene in zip(captions, scenes)]
    clean, ends = torch.from_numpy(render(scenes)), torch.from_numpy(render([scene for scene, _ in edits]))
    false = torch.tensor([falsifies for _, falsifies in edits])
    mask = torch.from_numpy(np.stack([random_mask(rng) for _ in scenes]))[:, None]
    images, change = clean + mask * (ends - clean), (ends - clean).square()
    share = 1 - (mask * change).sum((1, 2, 3)) / change.sum((1, 2, 3))
    bent = torch.from_numpy(rng.random(len(scenes)) < BENT)
    images = torch.where(bent[:, None, None, None], bend(clean, rng), images)
    mixed = (share > LEAST) & (share < 1 - LEAST)
    return Between(images, ends, false & ~bent, ~false, share.masked_fill(bent, 1.0), bent | (mixed & ~false))


def edited(caption: dict[str, Any], scene: Scene, rng: np.random.Generator) -> tuple[Scene, bool]:
    """Return the scene with one edit, and True if the caption is false for it."""
    tag, (first, *others) = caption["tag"], [scene[i] for i in rng.permutation(len(scene))]
    free = [i for i, (x, y) in enumerate(CELLS) if all(max(abs(o.x - x), abs(o.y - y)) > SIZE / 4 for o in scene)]
    shape, color = pick(SHAPES, first.shape, rng), pick(tuple(COLORS), first.color, rng)
    changes: dict[str, tuple[Scene, bool]] = {
        "recolor": ((replace(first, color=color), *others), tag in ("colors", "color_attr")),
        "reshape": ((replace(first, shape=shape), *others), True),
        "remove": (tuple(others), True),
    }
    if free:
        more = place(rng.choice([first.shape, shape]), rng.choice([first.color, color]), rng.choice(free), rng)
        changes["add"] = ((*scene, more), True)
    if others and others[0].shape != first.shape:
        second, rest = others[0], others[1:]
        shapes = (replace(first, shape=second.shape), replace(second, shape=first.shape), *rest)
        changes["swap shapes"] = (shapes, tag in ("position", "color_attr"))
    if others and others[0].color != first.color:
        second, rest = others[0], others[1:]
        colors = (replace(first, color=second.color), replace(second, color=first.color), *rest)
        changes["swap colors"] = (colors, tag == "color_attr")
    if tag in OPEN_COLORS and rng.random() < RECOLORED:  # attributes that the caption does not specify
        return changes["recolor"]
    swap = {"position": "swap shapes", "color_attr": "swap colors"}.get(tag)
    if swap in changes and rng.random() < SWAPPED:  # the hardest to distinguish
        return changes[swap]
    return changes[rng.choice(list(changes))]


def pick(choices: tuple[str, ...], besides: str, rng: np.random.Generator) -> str:
    others = [choice for choice in choices if choice != besides]
    return others[rng.integers(len(others))]


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Return the weight of the second scene, [32, 32] in [0, 1]: evenly, in stripes, or in patches."""
    kind = rng.choice(["even", "stripes", "patches"])
    if kind == "even":
        return np.full((SIZE, SIZE), rng.random(), np.float32)
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

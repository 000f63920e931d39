"""Pictures between two scenes, and bent ones: what a generator draws when it does not quite manage, or games a reward.

A second scene, the first with one edit, shows through evenly, in stripes or in patches: two colours in one shape, half
a shape, a ghost of one too many. A reward that has seen good drawings only is easily pleased by these, and its gradient
knows no way from a wrong scene to the right one, since nothing in between was ever shown to it. So:

- where the edit makes the caption false, the picture is as good as its share of the true scene (`share`);
- where it does not (another colour, and none is named), both ends are good and what lies between is bad (`bad`);
- bent pictures, whose shapes are none of the six, are bad.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.shapeworld.world import CELLS, COLORS, SHAPES, SIZE, Scene, place, render

BENT = 0.2  # share of pictures that are bent instead of mixed
BEND = (1.2, 2.0)  # pixels, standard deviation of the displacement
OPEN_COLORS = ("single_object", "two_object", "counting", "position")
RECOLORED = 0.25  # share of their edits that recolour, more than its turn among the others
SWAPPED = 0.7  # share of edits that swap, where the caption is about who stands where or who has which colour
LEAST = 0.08  # share of either scene in a picture that counts as mixed


@dataclass(frozen=True)
class Between:
    """One picture a scene; all in [0, 1]."""

    images: Tensor  # [B, 3, 32, 32]
    ends: Tensor  # [B, 3, 32, 32] the edited scenes, well drawn
    false: Tensor  # [B] whether the caption is false of the edited scene; not for bent ones
    true: Tensor  # [B] whether it is true of it
    share: Tensor  # [B] of the true scene in the picture, by squared distance; 1 for bent ones
    bad: Tensor  # [B] whether the picture is bad although both ends are good, or bent


def between(captions: list[dict[str, Any]], scenes: list[Scene], rng: np.random.Generator) -> Between:
    """Pictures between each scene, of which its caption is true, and an edit of it."""
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
    """The scene with one change, and whether the caption is false of it."""
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
    if tag in OPEN_COLORS and rng.random() < RECOLORED:  # what the caption leaves open
        return changes["recolor"]
    swap = {"position": "swap shapes", "color_attr": "swap colors"}.get(tag)
    if swap in changes and rng.random() < SWAPPED:  # what is hardest to tell
        return changes[swap]
    return changes[rng.choice(list(changes))]


def pick(choices: tuple[str, ...], besides: str, rng: np.random.Generator) -> str:
    others = [choice for choice in choices if choice != besides]
    return others[rng.integers(len(others))]


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """How much of the second scene shows, [32, 32] in [0, 1]: evenly, in stripes, or in patches."""
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

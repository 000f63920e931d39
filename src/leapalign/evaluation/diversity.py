"""Diversity: the mean pairwise distance of several images of one prompt, in a named feature space.

Reward training can make all images of a prompt alike, which no score of single images shows. Two models are compared on
the same prompts and noise; their ratio matters more than the values, which depend on the space.

| features     | vector                                                           | distance                    |
|--------------|------------------------------------------------------------------|-----------------------------|
| `pixels`     | the image averaged to 8 × 8 pixels, 192 numbers                  | root mean square, [0, 1]    |
| `clip-image` | normalised image embedding of a loaded CLIP reward               | 1 - cosine, [0, 2]          |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.prompts import Prompt
from leapalign.prompts.base import spread
from leapalign.rewards.base import Reward

PIXELS, CLIP_IMAGE = "pixels", "clip-image"
SPACES = (PIXELS, CLIP_IMAGE)
SIDE = 8  # pixels a side of the `pixels` features


class Features(Protocol):
    """A feature space of images."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] in [0, 1] to features [N, D] float32."""
        ...

    def distances(self, features: Tensor) -> Tensor:
        """Distance of every pair: [..., n, D] -> [..., n, n]."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Images averaged to SIDE × SIDE pixels, compared by the root mean square of their differences."""

    name: str = PIXELS

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)

    def distances(self, features: Tensor) -> Tensor:
        euclidean = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        return euclidean / features.shape[-1] ** 0.5


@dataclass(frozen=True)
class Embedding:
    """Unit vectors of a reward's image tower, compared by their cosine."""

    embed: Callable[[Tensor], Tensor]
    name: str = CLIP_IMAGE

    def __call__(self, images: Tensor) -> Tensor:
        return self.embed(images).float()

    def distances(self, features: Tensor) -> Tensor:
        return 1 - features @ features.mT


@dataclass(frozen=True, kw_only=True)
class Diverse:
    """Prompts of which several images each are drawn to measure diversity."""

    prompts: Sequence[Prompt]
    images_per_prompt: int = 4

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2 or not self.prompts:
            raise UserError(
                f"diversity of {self.images_per_prompt} images of each of {len(self.prompts)} prompts; expected at "
                "least 2 images and 1 prompt"
            )


def find_features(name: str, rewards: Mapping[str, Reward]) -> Features:
    """Return the feature space `name`; for `clip-image`, that of the last reward with an image embedding.

    The last, because rewards that a run trains on come first, and their space is the one that training distorts. Raises
    UserError for an unknown name, or if no reward has one.
    """
    if name == PIXELS:
        return Pixels()
    if name != CLIP_IMAGE:
        raise UserError(f"features {name!r}: expected one of {', '.join(SPACES)}")
    for reward in reversed(list(rewards.values())):
        if embed := reward.image_embedding():
            return Embedding(embed)
    raise UserError(
        f"features {CLIP_IMAGE!r}: none of the rewards ({', '.join(rewards) or 'none'}) has an image embedding; add a "
        f"CLIP reward (pickscore, clipscore, hpsv2, aesthetic), or use {PIXELS!r}"
    )


def spaces_of(rewards: Mapping[str, Reward]) -> dict[str, Features]:
    """Return every feature space that these rewards allow, by name."""
    possible = any(reward.image_embedding() for reward in rewards.values())
    return {name: find_features(name, rewards) for name in (SPACES if possible else (PIXELS,))}


def mean_pairwise_distance(space: Features, features: Tensor) -> Tensor:
    """Mean distance over the n (n - 1) / 2 pairs of each prompt's images: features [P, n, D], n ≥ 2 -> [P]."""
    n = features.shape[1]
    rows, columns = torch.triu_indices(n, n, offset=1)
    return space.distances(features)[:, rows, columns].mean(1)


def diverse(prompts: Sequence[Prompt], num: int = 30, images_per_prompt: int = 4) -> Diverse:
    """Choose about `num` different prompts, as many of each task (or of all, without tasks), evenly spaced."""
    tags: dict[str, dict[str, Prompt]] = {}
    for prompt in prompts:
        tags.setdefault((prompt.metadata or {}).get("tag", ""), {}).setdefault(prompt.text, prompt)
    chosen: list[Prompt] = []
    for group in tags.values():
        chosen += spread(list(group.values()), max(1, num // len(tags)))
    return Diverse(prompts=tuple(chosen), images_per_prompt=images_per_prompt)

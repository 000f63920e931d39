"""Images for prompts with paired noise: image n of prompt i starts from the same noise for every model.

The difference between two models has a much smaller standard error on the same noise than on independent noise. The
noise is a function of (seed, index of the prompt, index of the image) only, not of batches or other prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.evaluation.image_folder import image_paths, is_whole, write_image
from leapalign.flow.rollout import rollout
from leapalign.prompts import Prompt
from leapalign.seeds import generator

if TYPE_CHECKING:
    from leapalign.models.base import Model

PURPOSE = "evaluation noise"
MOST = 10**6  # sampling steps, images a prompt, images at a time: more is a slip of the hand


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings with which images are sampled for an evaluation."""

    num_steps: int = 25  # T
    images_per_prompt: int = 1
    batch_size: int = 64  # images at a time; changes memory and time only
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "images_per_prompt", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1 and at most {MOST}")

    def record(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return the settings that determine a model's images, as JSON values."""
        texts = json.dumps([prompt.text for prompt in prompts])
        return {
            "num_steps": self.num_steps,
            "images_per_prompt": self.images_per_prompt,
            "seed": self.seed,
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        }


def batches(num_prompts: int, sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
    """Yield (index of the prompt, index of the image) of all images, prompt by prompt, `batch_size` at a time."""
    places = [(i, n) for i in range(num_prompts) for n in range(sampling.images_per_prompt)]
    for start in range(0, len(places), sampling.batch_size):
        yield places[start : start + sampling.batch_size]


@torch.no_grad()
def draw_batch(model: Model, prompts: Sequence[str], sampling: Sampling, batch: Sequence[tuple[int, int]]) -> Tensor:
    """Sample images [B, 3, H, W] in [0, 1], on the CPU, with the model's current weights."""
    noise = model.noise([generator(sampling.seed, step=i, sample=n, purpose=PURPOSE) for i, n in batch])
    velocity = model.velocity(model.encode([prompts[i] for i, _ in batch]))
    return model.decode(rollout(velocity, noise, model.sigmas(sampling.num_steps))).float().cpu()


def draw_images(model: Model, prompts: Sequence[str], sampling: Sampling) -> Tensor:
    """Sample all images [P * images_per_prompt, 3, H, W] in [0, 1] in memory, prompt by prompt."""
    model.prepare(list(dict.fromkeys(prompts)))
    return torch.cat([draw_batch(model, prompts, sampling, batch) for batch in batches(len(prompts), sampling)])


def draw_files(
    model: Model,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    folder: Path,
    on_batch: Callable[[int], None] | None = None,
) -> list[Path]:
    """Sample the images that the folder lacks, writing each batch before the next; return the paths of all images.

    A batch is sampled again unless all of it exists, so a continued folder equals an uninterrupted one bit for bit.
    `on_batch` is called with the number of images that are finished.
    """
    paths, texts = image_paths(folder, len(prompts), sampling.images_per_prompt), [prompt.text for prompt in prompts]
    done, prepared = 0, False
    for batch in batches(len(prompts), sampling):
        targets = paths[done : done + len(batch)]
        if not all(is_whole(path) for path in targets):
            if not prepared:
                model.prepare(list(dict.fromkeys(texts)))
                prepared = True
            for path, image, (i, _) in zip(targets, draw_batch(model, texts, sampling, batch), batch):
                write_image(path, image, prompts[i])
        done += len(batch)
        if on_batch:
            on_batch(done)
    return paths

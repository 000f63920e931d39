"""Pictures for prompts with paired noise: picture n of prompt i begins at the same noise for every model compared.

A difference between two models over the same noises has a much smaller standard error than one over fresh noises. The
noise is a function of (seed, prompt's place, picture's number) alone, so neither batches nor other prompts change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.seeds import generator

if TYPE_CHECKING:
    from leapalign.models.base import Model

PURPOSE = "evaluation noise"
MOST = 10**6  # sampling steps, pictures a prompt, pictures at a time: beyond it is a slip of the hand


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn for an evaluation."""

    num_steps: int = 25  # T
    images_per_prompt: int = 1
    batch_size: int = 64  # pictures at a time; changes memory and time only
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "images_per_prompt", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1 and at most {MOST}")


@torch.no_grad()
def draw_images(
    model: Model, prompts: Sequence[str], sampling: Sampling, on_batch: Callable[[int], None] | None = None
) -> Tensor:
    """Pictures [P * images_per_prompt, 3, H, W] in [0, 1] on the CPU, prompt by prompt, with the present weights.

    `on_batch` hears how many pictures are done.
    """
    model.prepare(list(dict.fromkeys(prompts)))
    sigmas = model.sigmas(sampling.num_steps)
    places = [(i, n) for i in range(len(prompts)) for n in range(sampling.images_per_prompt)]
    pictures = []
    for start in range(0, len(places), sampling.batch_size):
        batch = places[start : start + sampling.batch_size]
        noise = model.noise([generator(sampling.seed, step=i, sample=n, purpose=PURPOSE) for i, n in batch])
        velocity = model.velocity(model.encode([prompts[i] for i, _ in batch]))
        pictures.append(model.decode(rollout(velocity, noise, sigmas)).float().cpu())
        if on_batch:
            on_batch(start + len(batch))
    return torch.cat(pictures)

"""Images of several schedules over the sampling steps (flow/schedules.py), all from the evaluation's own noise.

Image n of prompt i starts from the noise with which `leapalign evaluate` draws it, so that the schedule with the
model's own velocity in all steps gives the evaluated images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.evaluation.image_folder import ImageFiles, image_paths, write_image
from leapalign.evaluation.sampling import PURPOSE, Sampling, batches
from leapalign.flow.rollout import Velocity
from leapalign.flow.schedules import Schedule, scheduled_rollouts
from leapalign.prompts import Prompt
from leapalign.prompts.base import spread
from leapalign.seeds import generator

if TYPE_CHECKING:
    from leapalign.models.base import Model

Velocities: TypeAlias = "Callable[[Sequence[int]], Sequence[Velocity]]"
"""velocities(rows) -> the velocities that schedules name, for the prompts with these indices."""
MOST = 10  # swaps or splits that are tried if none are given


def draw_schedules(
    model: Model,
    prompts: Sequence[Prompt],
    velocities: Velocities,
    schedules: Sequence[Schedule],
    sampling: Sampling,
    on_batch: Callable[[int], None] | None = None,
) -> list[ImageFiles]:
    """Return the images of each schedule, in the order of `prompts`; as files, so that memory does not grow.

    `model` gives noise, grid and decoder; the prompts of all velocities are prepared. `on_batch` is called with the
    number of images that are finished.
    """
    held = TemporaryDirectory(prefix="leapalign-images-")
    places = [Path(held.name, str(i)) for i in range(len(schedules))]
    paths = [image_paths(place, len(prompts), sampling.images_per_prompt) for place in places]
    done = 0
    for batch in batches(len(prompts), sampling):
        for files, images in zip(paths, draw_batch(model, velocities, schedules, sampling, batch)):
            for path, image, (i, _) in zip(files[done : done + len(batch)], images, batch):
                write_image(path, image, prompts[i])
        done += len(batch)
        if on_batch:
            on_batch(done * len(schedules))
    return [ImageFiles(tuple(files), held) for files in paths]


@torch.no_grad()
def draw_batch(
    model: Model,
    velocities: Velocities,
    schedules: Sequence[Schedule],
    sampling: Sampling,
    batch: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Return images [B, 3, H, W] in [0, 1], on the CPU, of each schedule. `batch`: indices of prompt and image."""
    noise = model.noise([generator(sampling.seed, step=i, sample=n, purpose=PURPOSE) for i, n in batch])
    sigmas = model.sigmas(sampling.num_steps)
    ends = scheduled_rollouts(velocities([i for i, _ in batch]), schedules, noise, sigmas)
    return [model.decode(x_0).float().cpu() for x_0 in ends]


def chosen_steps(given: Sequence[int], first: int, last: int) -> list[int]:
    """Return the given steps, noisiest first and each once; if none are given, at most MOST of first..last.

    Raises UserError for a step outside.
    """
    if wrong := [t for t in given if not first <= t <= last]:
        raise UserError(f"step {wrong[0]}: expected {first} to {last}; the last step before the image is 1")
    return sorted(set(given or spread(range(last, first - 1, -1), MOST)), reverse=True)

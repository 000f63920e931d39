"""Draw images for prompts and judge them: GenEval's six tasks by a detector, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.errors import RunStopped, UserError
from leapalign.evaluation.diversity import Diverse, mean_pairwise_distance, spaces_of
from leapalign.evaluation.image_folder import ImageFiles
from leapalign.evaluation.image_statistics import DEFINITIONS, image_statistics
from leapalign.evaluation.sampling import Sampling, draw_files
from leapalign.evaluation.statistics import Evaluation, Images
from leapalign.geneval.rules import Detection, judge
from leapalign.prompts import Prompt
from leapalign.rewards.adapt import complete
from leapalign.rewards.base import Reward

if TYPE_CHECKING:
    from leapalign.models.base import Model

DIVERSITY = "diversity"  # folder of the images whose distances are measured
Detector = Callable[[Tensor], Sequence[Sequence[Detection]]]
Scorers = Mapping[str, Callable[..., Tensor]]  # name -> a loaded reward, or any reward(images, texts) [B]


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    rewards: Scorers,
    detector: Detector | None,
    diversity: Diverse | None = None,
    folder: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Draw images for all prompts with the model's current weights and judge them; `detector` needs metadata.

    With `diversity`, several images of its prompts are drawn too, in a folder `diversity` beside the others, and their
    distances measured in every feature space that the rewards allow.

    Images are files in `folder`, or in a temporary folder for None. `folder` may have some of them already; the caller
    checks their settings with `begin_or_continue`. Memory does not grow with their number. `on_batch` is called with
    the number of images that are finished.
    """
    held = None if folder else TemporaryDirectory(prefix="leapalign-images-")
    paths = draw_files(model, prompts, sampling, folder or Path(held.name if held else ""), on_batch)
    each = [prompt for prompt in prompts for _ in range(sampling.images_per_prompt)]
    images = ImageFiles(tuple(paths), held)
    found = score(images, each, rewards=rewards, detector=detector, batch_size=sampling.batch_size)
    if diversity is None:
        return found
    beside = paths[0].parents[2] / DIVERSITY
    return replace(found, diversity=measure_diversity(model, diversity, sampling, rewards, beside))


@torch.no_grad()
def measure_diversity(
    model: Model, diversity: Diverse, sampling: Sampling, rewards: Scorers, folder: Path
) -> dict[str, Tensor]:
    """Draw the images into `folder`; return feature space -> mean pairwise distance [P] of each prompt's images."""
    per_prompt, batch_size = diversity.images_per_prompt, sampling.batch_size
    several = replace(sampling, images_per_prompt=per_prompt)
    images = ImageFiles(tuple(draw_files(model, diversity.prompts, several, folder)))
    spaces = spaces_of({name: complete(name, reward) for name, reward in rewards.items()})
    features: dict[str, list[Tensor]] = {name: [] for name in spaces}
    for start in range(0, len(images), batch_size):
        batch = torch.stack([images[i] for i in range(start, min(start + batch_size, len(images)))])
        for name, space in spaces.items():
            features[name].append(space(batch).cpu())
    vectors = {name: torch.cat(each).unflatten(0, (-1, per_prompt)) for name, each in features.items()}
    return {name: mean_pairwise_distance(spaces[name], each) for name, each in vectors.items()}


@torch.no_grad()
def score(
    images: Images, prompts: Sequence[Prompt], *, rewards: Scorers, detector: Detector | None, batch_size: int = 64
) -> Evaluation:
    """Judge N images, each [3, H, W] in [0, 1], of N prompts; `batch_size` of them are in memory at a time."""
    detections: list[Sequence[Detection]] = []
    values: dict[str, list[Tensor]] = {name: [] for name in rewards}
    statistics: dict[str, list[Tensor]] = {name: [] for name in DEFINITIONS}
    for start in range(0, len(prompts), batch_size):
        texts = [prompt.text for prompt in prompts[start : start + batch_size]]
        batch = torch.stack([images[start + i] for i in range(len(texts))])
        detections += detector(batch) if detector else []
        for name, reward in rewards.items():
            values[name].append(reward(batch, texts).float().cpu())
        for name, measured in image_statistics(batch).items():
            statistics[name].append(measured)
    verdicts = tuple(judge(_metadata(prompt), found) for prompt, found in zip(prompts, detections))
    whole = {name: torch.cat(each) for name, each in values.items()}
    for name, reward in rewards.items():
        _check(name, complete(name, reward), whole[name], [prompt.text for prompt in prompts])
    return Evaluation(
        prompts=tuple(prompts),
        images=images,
        detections=tuple(detections),
        verdicts=verdicts,
        rewards=whole,
        statistics={name: torch.cat(each) for name, each in statistics.items()},
    )


def _check(name: str, reward: Reward, values: Tensor, texts: list[str]) -> None:
    """Raise RunStopped for NaN and infinity, unless the reward generates text that may hold no number (`may_fail`)."""
    missing = (~values.isfinite()).nonzero().flatten().tolist()
    if missing and not reward.may_fail():
        raise RunStopped(f"the reward {name}: {values[missing[0]]} for the prompt {texts[missing[0]]!r}")
    if len(missing) == len(values):
        raise UserError(
            f"the reward {name} gave no readable number for any of {len(values)} images; are its weights right?"
        )


def _metadata(prompt: Prompt) -> dict[str, Any]:
    if not prompt.metadata or "tag" not in prompt.metadata:
        raise UserError(
            f"prompt {prompt.text!r} has no GenEval metadata; give prompts from a .jsonl with tag and include"
        )
    return prompt.metadata

"""Draw images for prompts and judge them: GenEval's six tasks by a detector, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.errors import RunStopped, UserError
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.evaluation.statistics import Evaluation
from leapalign.geneval.rules import Detection, judge
from leapalign.prompts import Prompt
from leapalign.rewards.adapt import complete
from leapalign.rewards.base import Reward

if TYPE_CHECKING:
    from leapalign.models.base import Model

Detector = Callable[[Tensor], Sequence[Sequence[Detection]]]
Scorers = Mapping[str, Callable[..., Tensor]]  # name -> a loaded reward, or any reward(images, texts) [B]


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    rewards: Scorers,
    detector: Detector | None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Draw images for all prompts with the model's present weights and score them; `detector` needs metadata."""
    images = draw_images(model, [prompt.text for prompt in prompts], sampling, on_batch)
    each = [prompt for prompt in prompts for _ in range(sampling.images_per_prompt)]
    return score(images, each, rewards=rewards, detector=detector, batch_size=sampling.batch_size)


@torch.no_grad()
def score(
    images: Tensor, prompts: Sequence[Prompt], *, rewards: Scorers, detector: Detector | None, batch_size: int = 64
) -> Evaluation:
    """Judge images [N, 3, H, W] of N prompts."""
    detections, verdicts = (), ()
    if detector:
        detections = tuple(detector(images))
        verdicts = tuple(judge(_metadata(prompt), found) for prompt, found in zip(prompts, detections))
    texts = [prompt.text for prompt in prompts]
    parts = [slice(start, start + batch_size) for start in range(0, len(texts), batch_size)]
    values = {name: torch.cat([r(images[p], texts[p]).float().cpu() for p in parts]) for name, r in rewards.items()}
    for name, reward in rewards.items():
        _check(name, complete(name, reward), values[name], texts)
    return Evaluation(prompts=tuple(prompts), images=images, detections=detections, verdicts=verdicts, rewards=values)


def _check(name: str, reward: Reward, values: Tensor, texts: list[str]) -> None:
    """NaN is an error, except for a reward whose generated text may hold no number (`may_fail`)."""
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

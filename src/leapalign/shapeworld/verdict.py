"""GenEval's verdict on ShapeWorld's images as a reward: 1 if the detector finds all that the prompt claims, else 0.

A rule and not a network: it has no gradient, and it cannot be pleased by anything but right images. For policy-gradient
methods, and to be held against learnt rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Reward, check_inputs

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ShapeWorldVerdict(DescribedReward):
    """GenEval's verdict by ShapeWorld's detector, for captions of ShapeWorld."""

    name: ClassVar[str] = "shapeworld-verdict"
    differentiable: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "32 x 32, the world's own"
    prompt_length: ClassVar[str] = "captions of ShapeWorld only"
    output_range: ClassVar[str] = "0 or 1"
    code_licence: ClassVar[str] = "Apache-2.0 (ours)"
    weights_licence: ClassVar[str] = "none: there are no weights"
    memory: ClassVar[str] = "none"

    def load(self, device: str = "cpu", dtype: str = "float32") -> VerdictReward:
        return VerdictReward()


@dataclass(frozen=True)
class VerdictReward(Reward):
    """1 for a right image, 0 for a wrong one."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge images [B, 3, 32, 32] in [0, 1]: [B] float32, without gradient; NaN for an image that is not finite.

        Raises UserError for a prompt that is no caption of ShapeWorld.
        """
        import torch

        from leapalign.geneval.rules import judge
        from leapalign.shapeworld.detector import detect

        check_inputs("shapeworld-verdict", images, prompts)
        claims = [claims_of(prompt) for prompt in prompts]
        finite = images.detach().flatten(1).isfinite().all(1)
        found = detect(images.detach().nan_to_num(0.0, 0.0, 0.0))
        verdicts = [float(judge(claim, seen).correct) for claim, seen in zip(claims, found)]
        return images.new_tensor(verdicts, dtype=torch.float32).where(finite, torch.nan)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Judge 8-bit images of 32 x 32 pixels: [N]."""
        from leapalign.rewards.adapt import score_as_tensors

        return score_as_tensors("shapeworld-verdict", self, images, prompts)


def claims_of(prompt: str) -> dict[str, Any]:
    """Return the caption's GenEval metadata. Raises UserError if it is none of ShapeWorld's."""
    if prompt not in _captions():
        raise UserError(
            f"shapeworld-verdict: {prompt!r} is no caption of ShapeWorld; use the prompts shapeworld with this reward"
        )
    return _captions()[prompt]


@cache
def _captions() -> dict[str, dict[str, Any]]:
    from leapalign.geneval.wording import TASKS
    from leapalign.shapeworld.captions import all_captions

    every = (record for tag in TASKS for wordings in all_captions(tag) for record in wordings)
    return {record["prompt"]: record for record in every}

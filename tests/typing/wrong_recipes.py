"""Recipes that the type checker must refuse; `make lint` reads this file, and nothing runs it.

Each line that is wrong carries an ignore comment, and an ignore comment that hides nothing is an error here.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from leapalign.methods import LeapAlign
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.tuning.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class Mine:
    """The least that a reward of the user's own must have."""

    name: ClassVar[str] = "mine"
    differentiable: ClassVar[bool] = True

    def load(self, device: str = "cpu", dtype: str = "float32") -> Callable[..., Tensor]:
        def score(images: Tensor, prompts: object) -> Tensor:
            return images.mean((1, 2, 3))

        return score


MODEL, METHOD, PROMPTS, TERM = SD3(path="a"), LeapAlign(), PromptFile(path="b"), RewardTerm(reward=Mine(), threshold=1)
RIGHT = Run(name="a", model=MODEL, method=METHOD, rewards=(TERM,), prompts=PROMPTS, out="b", tuning=LoRA(alpha=8))
COPY = replace(RIGHT, model=replace(RIGHT.model, height=64))

SWAPPED = Run(
    name="a",
    model=METHOD,  # pyright: ignore[reportArgumentType]
    method=MODEL,  # pyright: ignore[reportArgumentType]
    rewards=(TERM,),
    prompts=PROMPTS,
    out="b",
)
BARE = Run(
    name="a",
    model=MODEL,
    method=METHOD,
    rewards=TERM,  # pyright: ignore[reportArgumentType]
    prompts="prompts.txt",  # pyright: ignore[reportArgumentType]
    out="b",
)
CLASSES = Run(
    name="a",
    model=SD3,  # pyright: ignore[reportArgumentType]
    method=LeapAlign,  # pyright: ignore[reportArgumentType]
    rewards=(PickScore(),),  # pyright: ignore[reportArgumentType]
    prompts=PROMPTS,
    out="b",
    tuning=TERM,  # pyright: ignore[reportArgumentType]
)

"""User-defined rewards: any callable on image tensors, or a dataclass, in the user's Python file.

A run.json never runs the file that it names: the file must be given on the command line (as the recipe, as
`--reward file.py:name`, or by `--plugin`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Reward, check_inputs

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Custom(DescribedReward):
    """A function of your own file: `def score(images, prompts)` or `def score(images)` -> one number an image."""

    name: ClassVar[str] = "custom"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "the image's own"
    prompt_length: ClassVar[str] = "yours"
    output_range: ClassVar[str] = "yours"
    code_licence: ClassVar[str] = "yours"
    weights_licence: ClassVar[str] = "yours"
    memory: ClassVar[str] = "yours"

    function: str
    """file.py:name; images are float [B, 3, H, W] in [0, 1], prompts a list of B texts, the result is [B]."""

    def __post_init__(self) -> None:
        file, _, name = self.function.rpartition(":")
        if not (file.endswith(".py") and name.isidentifier()):
            raise UserError(f"custom: function is {self.function!r}; expected file.py:name, as in my_reward.py:redness")

    def load(self, device: str = "cpu", dtype: str = "float32") -> CustomReward:
        """Return the function with input and output checks. It must move its own weights to the images' device."""
        file, _, name = self.function.rpartition(":")
        function = getattr(module_of(self.function), name, None)
        if not callable(function):
            raise UserError(f"custom: {file} has no function {name!r}")
        return CustomReward(self.function, function, prompted=takes_prompts(self.function, function))


@dataclass(frozen=True)
class CustomReward(Reward):
    """The user's function with the checks of inputs and scores that every reward has."""

    label: str
    function: Callable[..., Any]
    prompted: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], at least float32."""
        import torch

        check_inputs("custom", images, prompts)
        scores = self.function(images, list(prompts)) if self.prompted else self.function(images)
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(images),):
            got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise UserError(
                f"custom: {self.label} gave {got} for {len(images)} images; expected a tensor [{len(images)}]"
            )
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images, each in its own size: [N], no gradient."""
        from leapalign.rewards.adapt import score_as_tensors

        return score_as_tensors("custom", self, images, prompts)


def module_of(function: str) -> ModuleType:
    """Return the loaded module of `file.py:name`: the same path, or else the same file name. Raises UserError."""
    file = Path(function.rpartition(":")[0])
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("leapalign_user_")]
    files = {Path(str(module.__file__)).resolve(): module for module in loaded}
    if file.resolve() in files:
        return files[file.resolve()]
    named = [module for path, module in files.items() if path.name == file.name]
    if not named:
        raise UserError(f"custom: {function} is code of your own; give its file again with --plugin {file}")
    if len({Path(str(module.__file__)).read_bytes() for module in named}) > 1:
        given = ", ".join(str(module.__file__) for module in named)
        raise UserError(f"custom: {function} may mean any of {given}; rename all but one")
    return named[-1]


def takes_prompts(label: str, function: Callable[..., Any]) -> bool:
    """Return True if the function takes images and prompts. Raises UserError unless it takes 1 or 2 arguments."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in inspect.signature(function).parameters.values() if p.kind in by_place]
    needed = [p for p in places if p.default is p.empty]
    if not places or len(needed) > 2:
        raise UserError(f"custom: {label} takes {len(needed)} arguments; expected (images, prompts) or (images)")
    return len(places) > 1

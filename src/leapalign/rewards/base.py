"""What a reward is: two protocols, and the checks at their border.

A reward is added by one new file: a frozen dataclass with the class variables of `DescribedReward` and a `load()` that
does the heavy imports. Nothing registers it; `tests/contracts/test_rewards.py` finds it here and asks for a fixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from leapalign.errors import opening

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

RANGE_SLACK = 0.01  # decoders round; a picture in [-1, 1] or [0, 255] is far outside


class Reward(Protocol):
    """A loaded reward, frozen and in eval mode.

    Images are float [B, 3, H, W] in [0, 1]; the answer is [B], float32 (float64 for a model loaded in float64), on the
    images' device and differentiable in them. Sample b depends on image b and prompt b alone. NaN and infinity go
    through: whoever asked must see them. Wrong shapes, ranges or counts raise ValueError.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class RewardConfig(Protocol):
    """A reward's settings: a frozen, keyword-only dataclass that imports no torch before `load`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]  # as in flags and tables
    differentiable: ClassVar[bool]  # False: a direct-gradient method refuses it at start-up

    def load(self, device: str = "cpu", dtype: str = "float32") -> Reward: ...


class DescribedReward(RewardConfig, Protocol):
    """A reward of this package: its settings, and the facts that `leapalign list` shows."""

    reads_prompt: ClassVar[bool]  # False: the score is the picture's alone, though a prompt an image must still come
    resolution: ClassVar[str]  # what the network sees
    output_range: ClassVar[str]  # of the default settings, and where published models usually lie
    code_licence: ClassVar[str]
    weights_licence: ClassVar[str]
    memory: ClassVar[str]  # of the published weights


class PictureReward(Protocol):
    """A reward that also scores picture files."""

    def score_pictures(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor: ...


T = TypeVar("T", bound=PictureReward)


def tried(name: str, folder: str, reward: T) -> T:
    """The reward, once it has scored a grey picture: its files fit together in more than their names and shapes."""
    from PIL import Image

    with opening(f"{name}: the files at {folder} do not fit together", "fetch or copy all of them again"):
        reward.score_pictures([Image.new("RGB", (32, 24), "grey")], ["a try"])
    return reward


def check_inputs(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless images are float [B, 3, H, W] in [0, 1] with one prompt each."""
    check_images(name, images)
    if isinstance(prompts, str):
        raise ValueError(f"{name}: prompts is one string; expected a sequence with one prompt an image: [{prompts!r}]")
    if len(prompts) != len(images):
        raise ValueError(f"{name}: {len(images)} images and {len(prompts)} prompts; give one prompt an image")


def check_ids(name: str, images: Tensor, input_ids: Tensor) -> None:
    """Raise ValueError unless images are float [B, 3, H, W] in [0, 1] with one row of token ids each."""
    check_images(name, images)
    if len(input_ids) != len(images):
        raise ValueError(f"{name}: {len(images)} images and {len(input_ids)} rows of ids; give one row an image")


def check_pictures(name: str, pictures: Sequence[Image], prompts: Sequence[str]) -> None:
    """Raise ValueError unless there is one prompt a picture file."""
    if len(pictures) != len(prompts):
        raise ValueError(f"{name}: {len(pictures)} pictures and {len(prompts)} prompts; give one prompt a picture")


def check_images(name: str, images: Tensor) -> None:
    shape = list(images.shape)
    if images.ndim != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"{name}: images have shape {shape}; expected [B, 3, H, W] with nothing empty")
    if not images.is_floating_point():
        raise ValueError(f"{name}: images are {images.dtype}; expected float in [0, 1]: divide 8-bit pictures by 255")
    low, high = (float(bound) for bound in images.detach().aminmax())
    outside = low < -RANGE_SLACK or high > 1 + RANGE_SLACK
    # NaN and infinity are no mistake of range: they go on into the score, where the run stops and names them.
    if outside and math.isfinite(low) and math.isfinite(high):
        raise ValueError(
            f"{name}: pixels lie in [{low:.3g}, {high:.3g}]; expected [0, 1]. "
            "Rescale [-1, 1] with (x + 1) / 2 and [0, 255] with x / 255"
        )

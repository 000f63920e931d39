"""The protocols of rewards, what a published reward states about itself, and the checks of their inputs.

A published reward is one folder: its configuration (`__init__.py`, which imports no torch), its network (`model.py`),
its sizes (`sizes.py`) and its texts. `DescribedReward` holds all facts about it, so that planning, verification and the
command line need no names of rewards. `leapalign.rewards.BUILT_IN` lists the built-in ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from leapalign.errors import UserError, opening

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from leapalign.storage.token_limits import TooLong

RANGE_SLACK = 0.01  # allows for rounding; images in [-1, 1] or [0, 255] are far outside


@runtime_checkable
class Reward(Protocol):
    """A loaded reward, frozen and in eval mode. Inherit from it to get the defaults below.

    A user-defined reward may be a plain callable `(images, prompts) -> [B]`, which `leapalign.rewards.adapt` completes.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1], float: [B], float32 (float64 for a model loaded in float64).

        The scores lie on the images' device and are differentiable in them. Sample b depends on image b and prompt b
        alone. NaN and infinity are passed on to the caller. Wrong shapes, ranges or counts raise ValueError.
        """
        ...

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through Pillow, as published scores of files were made: [N], no gradient.

        Raises `UnfitImage` for an image that the preprocessing cannot take, ValueError for a wrong number of prompts.
        """
        ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """Compute and cache features that depend on the prompts alone; by default none."""

    def longer(self, prompts: Sequence[str]) -> TooLong | None:
        """Count the prompts that exceed the reward's token limit; None if it reads prompts of any length."""
        return None

    def may_fail(self) -> bool:
        """Return True if a score may be NaN because a generated text has no number; otherwise NaN is an error."""
        return False

    def network(self) -> nn.Module | None:
        """Return the network, for memory plans and for sharding; None if there is none."""
        return None

    def image_embedding(self) -> Callable[[Tensor], Tensor] | None:
        """Return the map from images [B, 3, H, W] in [0, 1] to unit vectors [B, D], for diversity; None without one."""
        return None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that a reward reads: a local file or folder, a hub id, or `embedded:NAME`."""

    field: str  # field of the configuration: path, processor, head
    path: str
    weights: bool = True  # False: only tokenizer and settings are read
    file: str = ""  # file in a published repository; empty: unknown
    bytes: int = 0  # approximate size of that file; 0: unknown


@dataclass(frozen=True, kw_only=True)
class Weightless:
    """A reward on the meta device, for plans and benchmarks."""

    make: Callable[[], Any]  # builds a loaded reward with `model` on the meta device
    score: Callable[[Any, Tensor], Tensor]  # (reward, images [B, 3, H, W]) -> [B]; does not depend on image values
    heads: tuple[str, ...] = ()  # submodules of `model` that compute in at least float32


@runtime_checkable
class Loads(Protocol):
    """The only member that a user-defined reward's settings, or their class, must have."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> Callable[..., Tensor]: ...


class RewardConfig(Protocol):
    """A reward's settings: a frozen, keyword-only dataclass that imports no torch before `load`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]
    """Name in flags, metrics and tables."""
    differentiable: ClassVar[bool]
    """False: direct-gradient methods refuse it at the start."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> Callable[..., Tensor]:
        """Load a `Reward`, or any callable (images, prompts) -> [B], which `leapalign.rewards.adapt` completes.

        Raises UserError if files are missing or belong to another model.
        """
        ...


@runtime_checkable
class DescribedReward(RewardConfig, Protocol):
    """A reward's settings with facts for plans, `verify` and `list`. Inherit from it to get the defaults below.

    `leapalign.rewards.adapt` adds them to a user-defined dataclass that does not inherit.
    """

    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    """False: the score depends on the image alone, but one prompt per image is still required."""
    resolution: ClassVar[str] = "not stated"
    """Size and crop of the image that the network sees."""
    prompt_length: ClassVar[str] = "not stated"
    """How much of a prompt the network reads."""
    output_range: ClassVar[str] = "not stated"
    """Range of the scores at the default settings, and typical scores of published models."""
    code_licence: ClassVar[str] = "not stated"
    weights_licence: ClassVar[str] = "not stated"
    memory: ClassVar[str] = "not stated"
    """Memory of the published weights."""

    def sources(self) -> tuple[Source, ...]:
        """List the files that `load` reads; by default none."""
        return ()

    def in_evaluations(self) -> RewardConfig:
        """Return the reward by which a finished run is judged: itself, or the reward that a value model learnt."""
        return self

    def weightless(self) -> Weightless | None:
        """Return the reward on the meta device if its sizes are known without reading weights; by default None."""
        return None


class UnfitImage(UserError, ValueError):
    """An image that a reward's preprocessing cannot take. `index`: its index in the input."""

    def __init__(self, problem: str, index: int = 0) -> None:
        super().__init__(f"image {index + 1}: {problem}")
        self.problem, self.index = problem, index


R = TypeVar("R", bound=Reward)


def tried(name: str, folder: str, reward: R) -> R:
    """Score a grey image to test that the loaded files work together; return the reward. Raises UserError."""
    from PIL import Image

    with opening(f"{name}: the files at {folder} do not fit together", "fetch or copy all of them again"):
        reward.score_pil([Image.new("RGB", (32, 24), "grey")], ["a try"])
    return reward


def check_inputs(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless images are float [B, 3, H, W] in [0, 1] with one prompt each."""
    check_images(name, images)
    if isinstance(prompts, str):
        raise ValueError(f"{name}: prompts is one string; expected a sequence with one prompt an image: [{prompts!r}]")
    check_prompts(name, images, prompts)


def check_prompts(name: str, images: Sequence[Image] | Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless there is one prompt per image."""
    if len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} images and {len(prompts)} prompts; give one prompt an image")


def check_ids(name: str, images: Tensor, input_ids: Sequence[Tensor] | Tensor) -> None:
    """Raise ValueError unless images are float [B, 3, H, W] in [0, 1] with one row of token ids each."""
    check_images(name, images)
    if len(input_ids) != len(images):
        raise ValueError(f"{name}: {len(images)} images and {len(input_ids)} rows of ids; give one row an image")


def check_images(name: str, images: Tensor) -> None:
    """Raise ValueError unless images are float [B, 3, H, W] in [0, 1]; NaN and infinity pass."""
    shape = list(images.shape)
    if images.ndim != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"{name}: images have shape {shape}; expected [B, 3, H, W] with nothing empty")
    if not images.is_floating_point():
        raise ValueError(f"{name}: images are {images.dtype}; expected float in [0, 1]: divide 8-bit images by 255")
    low, high = (float(bound) for bound in images.detach().aminmax())
    outside = low < -RANGE_SLACK or high > 1 + RANGE_SLACK
    # NaN and infinity pass the range check; the run stops at the score and names them.
    if outside and math.isfinite(low) and math.isfinite(high):
        raise ValueError(
            f"{name}: pixels lie in [{low:.3g}, {high:.3g}]; expected [0, 1]. "
            "Rescale [-1, 1] with (x + 1) / 2 and [0, 255] with x / 255"
        )

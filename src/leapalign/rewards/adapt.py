"""Complete user-defined rewards: members that a dataclass or callable lacks get defaults here.

The rest of leapalign relies on the protocols of `leapalign.rewards.base`, without attribute checks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Loads, Reward, RewardConfig, Source, Weightless, check_prompts
from leapalign.storage.token_limits import TooLong, sentence

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


def described(config: RewardConfig) -> DescribedReward:
    """Return the configuration; a user-defined one gets the facts and methods that it lacks.

    Raises UserError for a value without `load`.
    """
    if isinstance(config, DescribedReward):
        return config
    if isinstance(config, type) or not isinstance(config, Loads):
        raise UserError(f"reward: {config!r} is not a reward; expected a dataclass with a method load(device, dtype)")
    return Described(config)


def load_reward(config: RewardConfig, device: str, dtype: str) -> Reward:
    """Load the reward, complete. Raises UserError if its files are missing or are not its own."""
    return complete(described(config).name, config.load(device, dtype))


def numbered_names(configs: Sequence[RewardConfig]) -> list[str]:
    """Return each reward's name; repeated names get a number."""
    names: list[str] = []
    for config in configs:
        name = described(config).name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def complete(name: str, loaded: Callable[..., Tensor]) -> Reward:
    """Return a loaded reward; a user-defined callable gets the members of `Reward` that it lacks."""
    return loaded if isinstance(loaded, Reward) else Adapted(name=name, reward=loaded)


def tell_longer(rewards: Mapping[str, Reward], prompts: Sequence[str]) -> None:
    """Print one line on stderr for each reward that does not read the end of some of the prompts."""
    texts = list(dict.fromkeys(prompts))
    for name, reward in rewards.items():
        found = reward.longer(texts)
        if found is not None and found.count:
            print(sentence(f"the reward {name}", found, len(texts)), file=sys.stderr)


class Described(DescribedReward):
    """A user-defined dataclass that does not inherit from `DescribedReward`."""

    __dataclass_fields__: ClassVar[dict[str, Any]] = {}
    name: ClassVar[str] = ""  # set per instance in __init__

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        facts = {fact: getattr(config, fact) for fact in DescribedReward.__annotations__ if hasattr(config, fact)}
        vars(self).update({"name": getattr(config, "name", type(config).__name__)} | facts)

    def load(self, device: str = "cpu", dtype: str = "float32") -> Callable[..., Tensor]:
        return self.config.load(device, dtype)

    def sources(self) -> tuple[Source, ...]:
        own = getattr(self.config, "sources", None)
        return own() if own else ()

    def weightless(self) -> Weightless | None:
        own = getattr(self.config, "weightless", None)
        return own() if own else None


@dataclass(frozen=True, kw_only=True)
class Adapted(Reward):
    """A loaded user-defined reward: any callable (images, prompts) -> [B]."""

    name: str
    reward: Callable[..., Any]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score with its own `score_pil` if it has one, else as tensors, each image in its own size."""
        own = getattr(self.reward, "score_pil", None)
        return own(images, prompts) if own else score_as_tensors(self.name, self.reward, images, prompts)

    def prepare(self, prompts: Sequence[str]) -> None:
        if own := getattr(self.reward, "prepare", None):
            own(prompts)

    def longer(self, prompts: Sequence[str]) -> TooLong | None:
        own = getattr(self.reward, "longer", None)
        return own(prompts) if own else None

    def may_fail(self) -> bool:
        own = getattr(self.reward, "may_fail", None)
        return bool(own()) if own else False

    def network(self) -> nn.Module | None:
        """Return its `model` if that is an nn.Module, else None."""
        from torch import nn

        found = getattr(self.reward, "model", None)
        return found if isinstance(found, nn.Module) else None

    def image_embedding(self) -> Callable[[Tensor], Tensor] | None:
        own = getattr(self.reward, "image_embedding", None)
        return own() if own else None


@dataclass(frozen=True, kw_only=True)
class Wrapped(Reward):
    """A reward with a different call; all other members are passed through."""

    reward: Reward

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return self.reward.score_pil(images, prompts)

    def prepare(self, prompts: Sequence[str]) -> None:
        self.reward.prepare(prompts)

    def longer(self, prompts: Sequence[str]) -> TooLong | None:
        return self.reward.longer(prompts)

    def may_fail(self) -> bool:
        return self.reward.may_fail()

    def network(self) -> nn.Module | None:
        return self.reward.network()

    def image_embedding(self) -> Callable[[Tensor], Tensor] | None:
        return self.reward.image_embedding()


@dataclass(frozen=True, kw_only=True)
class OnDevice(Wrapped):
    """A reward on a device of its own: images are copied there, scores and gradients back."""

    device: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images.to(self.device), prompts).to(images.device)

    def image_embedding(self) -> Callable[[Tensor], Tensor] | None:
        own = self.reward.image_embedding()
        return (lambda images: own(images.to(self.device)).to(images.device)) if own else None


def score_as_tensors(name: str, reward: Callable[..., Any], images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
    """Score 8-bit images through their tensors, one by one, since their sizes may differ: [N], no gradient."""
    import torch

    from leapalign.images import to_tensor

    check_prompts(name, images, prompts)
    tensors = [to_tensor(image.convert("RGB"))[None] for image in images]
    with torch.no_grad():
        return torch.cat([reward(tensor, [prompt]) for tensor, prompt in zip(tensors, prompts)])

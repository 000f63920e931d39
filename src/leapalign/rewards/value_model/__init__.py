"""A value model: a small network that learns a reward without gradient during the run, and lends it its gradient.

LeapAlign (arXiv 2604.15311, Sec. 5) leaves this as future work; the design is ours, so no paper has its details.

    after each rollout    y_n = r(x_n, c_n)                          the true reward, which may be a rule
    value model           q(x, c), trained on (x_n, c_n, y_n) by cross-entropy or squared error
    policy                the method's loss with q in the place of r: d q / d x is the reward's gradient

A network is right only where it has seen data, and the policy moves to where it errs. So q is held against r on every
new batch, before q trains on it: `parity` is the share of pairs of images that q ranks as r does, over a window of
fresh samples. While parity is low q is not believed: the policy stays as it is and q goes on learning.

`leapalign.training.learning` does this within a run; docs/value-model.md describes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Source

if TYPE_CHECKING:
    from leapalign.rewards.base import RewardConfig
    from leapalign.rewards.value_model.model import ValueReward
else:  # the type that the codec sees
    RewardConfig = Any


@dataclass(frozen=True, kw_only=True)
class ValueModel(DescribedReward):
    """A network that learns the reward `of` during the run. For direct-gradient methods."""

    name: ClassVar[str] = "value-model"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "`resolution` pixels, or the backbone's own"
    prompt_length: ClassVar[str] = "48 words, or the backbone's own"
    output_range: ClassVar[str] = "that of the reward it learns; output=logit: any number"
    code_licence: ClassVar[str] = "Apache-2.0 (ours)"
    weights_licence: ClassVar[str] = "none: its weights are made in the run; those of the backbone are the backbone's"
    memory: ClassVar[str] = "under 1 MB, its buffer, and the backbone"

    of: RewardConfig
    """The reward to learn, which needs no gradient."""
    backbone: str = ""
    """Frozen CLIPModel (folder, hub id or embedded:reward) whose features it reads; empty: pixels, from scratch."""
    resolution: int = 32
    """Width and height of the pixels that it reads without a backbone; a multiple of 8."""
    width: int = 64
    """Channels of its layers; four times as many hidden numbers with a backbone."""
    loss: Literal["cross-entropy", "squared"] = "cross-entropy"
    """cross-entropy: for rewards in [0, 1]."""
    output: Literal["score", "logit"] = "score"
    """logit: of cross-entropy, before the sigmoid; its gradient does not vanish at images that are surely wrong."""
    learning_rate: float = 1e-3
    """Of its own AdamW."""
    weight_decay: float = 0.01
    train_steps: int = 20
    """Its own optimiser steps after each rollout."""
    train_batch: int = 64
    """Samples of one of these steps, drawn from the buffer."""
    buffer_size: int = 4096
    """Newest samples to learn from."""
    warmup_updates: int = 20
    """First updates of the run in which it learns and the policy does not."""
    parity_window: int = 256
    """Newest fresh samples over which parity is taken."""
    least_parity: float = 0.7
    """Below it the policy is not trained; 0.5 is chance, 1 the true reward's order."""
    seed: int = 0
    """Of its first weights."""

    def __post_init__(self) -> None:
        _check(self)

    def load(self, device: str = "cpu", dtype: str = "float32") -> ValueReward:
        """Load the reward to learn and the backbone, and make the first weights from `seed`."""
        from leapalign.rewards.value_model.model import load_value_reward

        return load_value_reward(self, device, dtype)

    def in_evaluations(self) -> RewardConfig:
        """Return the reward to learn: the network that learnt it stays in the run's checkpoints."""
        return self.of

    def sources(self) -> tuple[Source, ...]:
        """List the files of the reward to learn and of the backbone."""
        from leapalign.rewards.adapt import described

        backbone = (Source(field="backbone", path=self.backbone),) if self.backbone else ()
        return *described(self.of).sources(), *backbone


_LEAST = {"width": 1, "train_steps": 1, "train_batch": 1, "buffer_size": 1, "warmup_updates": 0, "parity_window": 2}


def _check(config: ValueModel) -> None:
    """Raise UserError for settings out of range."""
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"value-model: {name} is {getattr(config, name)}; it must be at least {least}")
    if config.resolution < 8 or config.resolution % 8:
        raise UserError(f"value-model: resolution is {config.resolution}; use a multiple of 8, for instance 32")
    for name in ("learning_rate", "weight_decay"):
        if not (math.isfinite(value := getattr(config, name)) and value >= 0):
            raise UserError(f"value-model: {name} is {value}; it must be finite and not negative")
    if not 0 <= config.least_parity <= 1:
        raise UserError(f"value-model: least_parity is {config.least_parity}; it must lie in [0, 1], try 0.7")
    if config.output == "logit" and config.loss == "squared":
        raise UserError("value-model: output logit is of the loss cross-entropy; use output score with squared")
    if isinstance(config.of, ValueModel):
        raise UserError("value-model: `of` is a value model itself; give the reward that it is to learn")

"""Settings of the monitors of a training run, and of the rule that ends it (docs/monitors.md).

A reward that is trained on rises whether images get better or not. Monitors measure what it does not: at each
evaluation, on the fixed set of prompts and noises, with the averaged weights. Their names are those of the metrics.
The defaults measure and stop nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leapalign.codec import check_fields
from leapalign.errors import UserError

if TYPE_CHECKING:
    from leapalign.rewards.base import RewardConfig
else:  # the type that the codec and the command line see
    RewardConfig = Any

MOST = 10**6


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A reward that is measured and never trained on; it needs no gradient. Its metric: `held_out/NAME`."""

    reward: RewardConfig  # a dataclass of leapalign.rewards
    device: str = ""  # device of the reward; empty = the model's
    dtype: Literal["", "float32", "bfloat16"] = ""  # of its weights; empty = the run's

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Monitors:
    """What an evaluation measures besides the training reward; off by default."""

    held_out: tuple[HeldOut, ...] = ()
    diversity_prompts: int = 0  # first prompts of the fixed set of which several images are drawn; 0 = none
    images_per_prompt: int = 4  # of these prompts: metric diversity/FEATURES, the mean distance of two images
    features: Literal["pixels", "clip-image"] = "pixels"  # clip-image: embedding of the last CLIP, held-out ones first
    image_statistics: bool = False  # metrics image/NAME: edges, colours, saturation, brightness, dark share
    prompt_monitors: bool = False  # the prompts' own: open_color_entropy and geneval_correct for ShapeWorld's
    drift_samples: int = 0  # first samples of the fixed set whose velocity is compared with the base's; 0 = none

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in {"diversity_prompts": 0, "images_per_prompt": 2, "drift_samples": 0}.items():
            if not least <= getattr(self, name) <= MOST:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least} and at most {MOST}")


NOTHING = Monitors()


@dataclass(frozen=True, kw_only=True)
class Band:
    """Values that a monitor may take, as multiples of its value at step 0."""

    monitor: str  # name of a metric of the evaluations, for instance open_color_entropy
    least: float = 0.0
    most: float = float(MOST)

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.least) and math.isfinite(self.most) and 0 <= self.least <= 1 <= self.most):
            raise UserError(
                f"band of {self.monitor}: {self.least} to {self.most}; expected 0 <= least <= 1 <= most, as multiples "
                "of the value at step 0"
            )


@dataclass(frozen=True, kw_only=True)
class StopWhen:
    """When to end a run before its last step, and which weights to export; off by default.

    The run ends when a held-out reward has fallen, or a monitor has been outside of its band, in `evaluations`
    consecutive evaluations, while the training reward rose over these. With `evaluations` > 0 the run exports the
    averaged weights of its best evaluation: the highest first held-out reward (without one: the training reward) of
    the evaluations after step 0 with all monitors in their bands; if there is none, the base.
    """

    evaluations: int = 0  # consecutive ones; 0 = never stop, and export the last weights
    tolerance: float = 0.1  # share of its best gain over step 0 that a held-out reward may lose before it has fallen
    bands: tuple[Band, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.evaluations <= MOST or not 0 <= self.tolerance < MOST:
            raise UserError(
                f"stop_when: evaluations {self.evaluations}, tolerance {self.tolerance}; expected numbers of at least 0"
            )
        if len({band.monitor for band in self.bands}) < len(self.bands):
            raise UserError("stop_when: a monitor has two bands; give it one")


NEVER = StopWhen()

"""Settings of a value model beside the reward that it learns, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from leapalign.errors import UserError

NAME = "value-model"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a value model reads, how it learns, and when it is believed."""

    backbone: str = ""
    """Frozen CLIPModel (folder, hub id or embedded:reward) whose features it reads; empty: pixels, from scratch."""
    pixels: int = 32
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


_LEAST = {"width": 1, "train_steps": 1, "train_batch": 1, "buffer_size": 1, "warmup_updates": 0, "parity_window": 2}


def check(settings: Settings) -> None:
    """Raise UserError for settings out of range."""
    for name, least in _LEAST.items():
        if getattr(settings, name) < least:
            raise UserError(f"value-model: {name} is {getattr(settings, name)}; it must be at least {least}")
    if settings.pixels < 8 or settings.pixels % 8:
        raise UserError(f"value-model: pixels is {settings.pixels}; use a multiple of 8, for instance 32")
    for name in ("learning_rate", "weight_decay"):
        if not (math.isfinite(value := getattr(settings, name)) and value >= 0):
            raise UserError(f"value-model: {name} is {value}; it must be finite and not negative")
    if not 0 <= settings.least_parity <= 1:
        raise UserError(f"value-model: least_parity is {settings.least_parity}; it must lie in [0, 1], try 0.7")
    if settings.output == "logit" and settings.loss == "squared":
        raise UserError("value-model: output logit is of the loss cross-entropy; use output score with squared")

"""Linear layers without activations in between: the head of ImageReward and of LAION's aesthetic score.

The published Sequential has dropouts at 1, 3 and 5, which do nothing in eval mode. The layers are not merged into one
matrix, so that rounding is as published.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leapalign.errors import UserError

if TYPE_CHECKING:
    from leapalign.rewards.checkpoint import Checkpoint

PLACES = (0, 2, 4, 6, 7)  # indices of the linear layers in the published Sequential
WIDTHS = (1024, 128, 64, 16, 1)  # their output widths, as published


class LinearHead(nn.Module):
    """Map features [B, D] to scores [B], in float32 (float64 for a float64 model). Keys as published."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        """`widths`: D, then each layer's output width; the last is 1."""
        super().__init__()
        self.layers = nn.ModuleDict({str(at): nn.Linear(*ends) for at, ends in zip(PLACES, pairwise(widths))})

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.dtype)
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def head_widths(checkpoint: Checkpoint, before: str = "") -> tuple[int, ...]:
    """Return D and each layer's output width, from the shapes of weights whose names start with `before`."""
    shapes = [checkpoint.shape(f"{before}layers.{at}.weight", 2) for at in PLACES]
    if shapes[-1][0] != 1:
        raise UserError(f"{checkpoint.name}: the head in {checkpoint.file} ends in {shapes[-1][0]} numbers; expected 1")
    return shapes[0][1], *(outputs for outputs, _ in shapes)


def head_dtype(dtype: torch.dtype) -> torch.dtype:
    """The head computes in at least float32, because half precision has only two digits."""
    return torch.promote_types(dtype, torch.float32)

"""Classifier-free guidance (arXiv:2207.12598) as part of the velocity: v = v_neg + scale * (v_prompt - v_neg).

The branches are two forwards of B rows, not one of 2B: half the memory, and `cfg_grad` can then drop the graph of
the negative branch without changing a bit of the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leapalign.models.base import Conditioning, Text

if TYPE_CHECKING:
    from leapalign.flow.rollout import Velocity

Predict = Callable[[Tensor, Tensor, Text], Tensor]  # (x [B, ...], sigma [], text [B, ...]) -> v [B, ...]


def guided(predict: Predict, conditioning: Conditioning, scale: float, *, through_both: bool) -> Velocity:
    """Velocity after guidance; without a negative prompt, one forward."""
    prompts, negative = conditioning.prompts, conditioning.negative

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        _check_rows(x, prompts)
        v = predict(x, sigma, prompts)
        if negative is None:
            return v
        # without this graph, d v = scale * d v_prompt: the negative branch counts as a constant
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_both):
            v_negative = predict(x, sigma, negative.expand(len(x)))
        return v_negative + scale * (v - v_negative)

    return velocity


def in_precision(predict: Predict, dtype: torch.dtype) -> Predict:
    """float32 in and out; bfloat16 computes in it (autocast) over the float32 weights.

    One autocast region a forward: its cache of cast weights must not carry casts made without graph (a negative
    branch, a rollout) into a forward with graph, which would lose the weights' gradient.
    """

    def velocity(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            v = predict(x.float(), sigma.to(x.device, torch.float32), text)
        return v.float()  # the Euler sum of many small steps needs float32

    return velocity


def _check_rows(x: Tensor, text: Text) -> None:
    if len(x) != len(text.tokens):
        raise ValueError(f"velocity: {len(x)} latents for {len(text.tokens)} prompts; encode one prompt a latent")

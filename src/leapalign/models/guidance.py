"""Classifier-free guidance (arXiv:2207.12598) as part of the velocity: v = v_neg + scale * (v_prompt - v_neg).

A family may combine the two branches in another way: its `combine`, a pure function of both, is fully differentiated.
The branches are two forwards of B rows, not one of 2B: this halves memory, and `cfg_grad` can drop the graph of the
negative branch without changing a bit of the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leapalign.flow.leap import per_sample
from leapalign.models.base import Conditioning, Text

if TYPE_CHECKING:
    from leapalign.flow.rollout import Velocity

Predict = Callable[[Tensor, Tensor, Text], Tensor]  # (x [B, ...], sigma [] or [B], text [B, ...]) -> v [B, ...]
Combine = Callable[[Tensor, Tensor, float], Tensor]  # (v of the prompts, v of the negative prompt, scale) -> v


def linear(v: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    return v_negative + scale * (v - v_negative)


def always(sigma: Tensor) -> bool:
    return True


@dataclass(frozen=True)
class Guidance:
    """When to run two branches and how to combine them."""

    scale: float
    through_both: bool  # False: the negative branch is a constant, without gradient
    negative_prompt: str
    combine: Combine = linear
    neutral: float = 1.0  # a scale of at most this means one branch and no negative prompt
    applies: Callable[[Tensor], bool] = always  # sigma, 0-dim -> True for two branches, False for one

    @property
    def active(self) -> bool:
        return self.scale > self.neutral


@dataclass(frozen=True)
class GuidedVelocity:
    """Velocity after guidance, from one forward or two; `wrap` is applied to each forward."""

    predict: Predict
    conditioning: Conditioning
    guidance: Guidance
    wrap: Callable[[Velocity], Velocity] = lambda forward: forward

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        prompts, negative, guidance = self.conditioning.prompts, self.conditioning.negative, self.guidance
        _check_rows(x, prompts)
        v = self._forward(x, sigma, prompts)
        guided = [] if negative is None else [guidance.applies(each) for each in sigma.reshape(-1)]
        if negative is None or not any(guided):
            return v
        # without this graph, terms of v_negative alone are constants; the value is unchanged
        with torch.set_grad_enabled(torch.is_grad_enabled() and guidance.through_both):
            v_negative = self._forward(x, sigma, negative.expand(len(x)))
        combined = guidance.combine(v, v_negative, guidance.scale)
        return combined if all(guided) else torch.where(per_sample(torch.tensor(guided).to(v.device), v), combined, v)

    def by_forward(self, wrap: Callable[[Velocity], Velocity]) -> Velocity:
        """Return the velocity with `wrap` around each forward."""
        return replace(self, wrap=wrap)

    def _forward(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        return self.wrap(lambda x, sigma: self.predict(x, sigma, text))(x, sigma)


def in_precision(predict: Predict, dtype: torch.dtype) -> Predict:
    """Wrap `predict` with float32 inputs and outputs; bfloat16 runs under autocast over float32 weights.

    Autocast's weight cache is off: it would hold copies of all weights until the forward ends (24 GB for FLUX.1),
    though each is used once, and reuse casts made without graph in a forward with graph, losing its gradient.
    """
    bfloat16 = dtype == torch.bfloat16

    def velocity(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            v = predict(x.float(), sigma.to(x.device, torch.float32), text)
        return v.float()  # summing many small Euler steps needs float32

    return velocity


def _check_rows(x: Tensor, text: Text) -> None:
    if len(x) != len(text.tokens):
        raise ValueError(f"velocity: {len(x)} latents for {len(text.tokens)} prompts; encode one prompt a latent")

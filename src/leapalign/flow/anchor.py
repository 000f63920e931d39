"""The velocity anchor: a quadratic pull of the trained velocity towards the base model's, for every method.

It adds beta * mean_d (v(x_t) - v_base(x_t))^2 to a sample's loss at each differentiated state x_t, so that the
gradient at v gets 2 beta (v - v_base) / (B D) (B: samples of the batch, D: numbers of a latent). Policy-gradient
methods have the same term as a KL divergence (Flow-GRPO, arXiv 2505.05470); RSM (arXiv 2604.17415) trains towards
v_base too.

A second term holds what the samples have in common. Correcting an image moves samples in different directions; giving
all shapes one colour, or all photos one tone, moves them in one. With m = mean over samples of v - v_base,
beta_mean * mean_d m^2 pulls only m back: the gradient at v gets 2 beta_mean m / (B D) for every sample. The mean is
over the samples of one forward, which must therefore be the whole batch.

The gradient reaches the weights and not the state: v_base moves with x as well, so a pull that travelled through a
nested input would train x_t towards places where both velocities agree, and not the weights at x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from leapalign.flow.rollout import Velocity


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor:
    """The anchor's weights, the base, and what was measured at the differentiated states."""

    weight: float  # beta
    mean_weight: float = 0.0  # beta_mean
    reference: Callable[[], AbstractContextManager[None]]  # inside, the policy has the base's weights
    batch_size: int  # samples of the whole batch, by which a sample's loss is divided
    nested: bool = True  # also at states that carry a gradient, where it costs one forward and backward more
    drifts: list[Tensor] = field(default_factory=list)  # [B] mean_d (v - v_base)^2, one for each state; see `measured`

    def gradient(self, velocity: Velocity, x: Tensor, sigma: Tensor, v: Tensor, share: float = 1.0) -> Tensor:
        """Return d anchor / dv [B, ...] at the value `v` of `velocity(x, sigma)`, and keep the drift.

        `share`: factor on it, 1 / M if M such terms are averaged.
        """
        with torch.no_grad(), self.reference():
            difference = v.detach() - velocity(x.detach(), sigma)
        self.drifts.append(difference.square().flatten(1).mean(1))
        pull = self.weight * difference + self.mean_weight * difference.mean(0, keepdim=True)
        return pull * (2 * share / (self.batch_size * difference[0].numel()))

    def pull(self, again: Velocity, velocity: Velocity, x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        """Return `v` (with graph) with the anchor's gradient added in the backward pass.

        `again(x, sigma)` runs the differentiated forward once more, if x carries a gradient.
        """
        if not x.requires_grad:
            return cast("Tensor", _Added.apply(v, self.gradient(velocity, x, sigma, v)))
        if not self.nested:
            return v
        return cast("Tensor", _Apart.apply(v, self.gradient(velocity, x, sigma, v), again, x.detach(), sigma))

    def measured(self) -> Tensor:
        """Return the mean drift over the states since the last call, [B] (0-dim 0 if none), and forget them."""
        drift = torch.stack(self.drifts).mean(0) if self.drifts else torch.zeros(())
        self.drifts.clear()
        return drift


def apart(again: Velocity, x: Tensor, sigma: Tensor, gradient: Tensor) -> None:
    """Backpropagate `gradient` at v(x, sigma) into the weights' .grad alone, through a forward of its own."""
    with torch.enable_grad():
        v = again(x.detach().requires_grad_(), sigma)
    torch.autograd.backward(v, gradient)


class _Added(torch.autograd.Function):
    """The identity; its backward adds a constant."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gradient: Tensor) -> Tensor:  # pyright: ignore
        ctx.gradient = gradient
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad + ctx.gradient, None


class _Apart(torch.autograd.Function):
    """The identity; its backward sends a constant through another forward, into the weights alone."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gradient: Tensor, again: Velocity, x: Tensor, sigma: Tensor) -> Tensor:  # pyright: ignore
        ctx.constants = (again, x, sigma, gradient)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        again, x, sigma, gradient = ctx.constants
        apart(again, x, sigma, gradient)
        return grad, None, None, None, None

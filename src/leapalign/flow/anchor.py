"""The velocity anchor: a quadratic pull of the trained velocity towards the base model's, for every method.

It adds beta * mean_d (v(x_t) - v_base(x_t))^2 to a sample's loss at each differentiated state x_t, so that the
gradient at v gets 2 beta (v - v_base) / (B D) (B: samples of the batch, D: numbers of a latent). Policy-gradient
methods have the same term as a KL divergence (Flow-GRPO, arXiv 2505.05470); RSM (arXiv 2604.17415) trains towards
v_base too.

A second term holds what the samples have in common. Correcting an image moves samples in different directions; giving
all shapes one colour, or all photos one tone, moves them in one. With m = mean over samples of v - v_base,
beta_mean * mean_d m^2 pulls only m back: the gradient at v gets 2 beta_mean m / (B D) for every sample. The mean is
over the batch's samples at the i-th differentiated state, i counted in the order in which a method asks for velocities;
samples with draws of their own are there at different sigma. If the batch has several micro-batches (`across`), all of
them are measured before the first backward: `Deviation.mean` is set from outside (leapalign.training.batch_mean).

The gradient reaches the weights and not the state: v_base moves with x as well, so a pull that travelled through a
nested input would train x_t towards places where both velocities agree, and not the weights at x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from leapalign.flow.rollout import Velocity


@dataclass(kw_only=True, eq=False)
class Deviation:
    """v - v_base at a differentiated state of one micro-batch."""

    x: Tensor  # [B, ...], a constant
    sigma: Tensor
    share: float = 1.0  # factor on the gradient, 1 / M if M such terms are averaged
    known: Tensor | None = None  # v of the rollout, if its differentiated forward runs in the backward pass
    difference: Tensor | None = None  # [B, ...] v - v_base: from its measurement to the backward pass
    mean: Tensor | None = None  # [1, ...] of the samples of the whole batch, if `Anchor.across`


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor:
    """The anchor's weights and the base."""

    weight: float  # beta
    mean_weight: float = 0.0  # beta_mean
    reference: Callable[[], AbstractContextManager[None]]  # inside, the policy has the base's weights
    batch_size: int  # samples of the whole batch, by which a sample's loss is divided
    nested: bool = True  # also at states that carry a gradient, where it costs one forward and backward more
    across: bool = False  # the mean is over several micro-batches

    def pulls_at(self, x: Tensor) -> bool:
        """Return whether states like x, with a gradient or without, are held."""
        return self.nested or not x.requires_grad

    def measure(self, velocity: Velocity, states: Sequence[Deviation], values: Sequence[Tensor]) -> list[Tensor]:
        """Set each state's difference from the base, given `velocity`'s values there; return the drifts, [B] each.

        A sample's drift is mean_d (v - v_base)^2.
        """
        drifts = []
        with torch.no_grad(), self.reference():
            for state, v in zip(states, values):
                difference = state.difference = v.detach() - velocity(state.x, state.sigma)
                drifts.append(difference.square().flatten(1).mean(1))
        return drifts

    def gradient(self, state: Deviation) -> Tensor:
        """Return d anchor / dv [B, ...] at a measured state, and free its difference."""
        difference, state.difference = state.difference, None
        assert difference is not None
        mean = state.mean if self.across else difference.mean(0, keepdim=True)
        assert mean is not None
        pull = self.weight * difference + self.mean_weight * mean
        return pull * (2 * state.share / (self.batch_size * difference[0].numel()))

    def pulled(self, v: Tensor, state: Deviation) -> Tensor:
        """Return `v` (with graph) at a state without gradient; the backward pass adds the anchor's gradient."""
        return cast("Tensor", _Added.apply(v, self, state))

    def pulled_apart(self, v: Tensor, state: Deviation, again: Velocity) -> Tensor:
        """Return `v` (with graph) at a nested state; the anchor's gradient gets a backward of its own.

        `again(x, sigma)` runs the differentiated forward once more.
        """
        return cast("Tensor", _Apart.apply(v, self, state, again))


def apart(again: Velocity, x: Tensor, sigma: Tensor, gradient: Tensor) -> None:
    """Backpropagate `gradient` at v(x, sigma) into the weights' .grad alone, through a forward of its own."""
    with torch.enable_grad():
        v = again(x.detach().requires_grad_(), sigma)
    torch.autograd.backward(v, gradient)


class _Added(torch.autograd.Function):
    """The identity; its backward adds the anchor's gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, anchor: Anchor, state: Deviation) -> Tensor:  # pyright: ignore
        ctx.constants = (anchor, state)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        anchor, state = ctx.constants
        return grad + anchor.gradient(state), None, None


class _Apart(torch.autograd.Function):
    """The identity; its backward sends the anchor's gradient through another forward, into the weights alone."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, anchor: Anchor, state: Deviation, again: Velocity) -> Tensor:  # pyright: ignore
        ctx.constants = (anchor, state, again)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        anchor, state, again = ctx.constants
        apart(again, state.x, state.sigma, anchor.gradient(state))
        return grad, None, None, None

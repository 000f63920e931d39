"""RSM, reward score matching (arXiv 2604.17415; its gradient-based design, from VGG-Flow, arXiv 2512.05116).

The velocity is regressed on the base's, moved by the reward's gradient at the image of the sample's own rollout:

    g = grad r(decode(x_0)) once a rollout, clipped      target_t = v_ref(x_t) - beta (1 - sigma_t) g
    L = mean_t mean_d (v(x_t) - target_t)^2

The sign: x_0 = x_T - sum_t |D_t| v_t, so v has to fall along g for the reward to rise. Trained steps are independent
forwards at states of the rollout. With the reward's own loss l, whose gradient at x_0 is -g, and L scaled by
`Run.anchor_weight` = D / (2 beta) (D: numbers of a latent), the gradient for the weights is

    mean_t (1 - sigma_t) g dv(x_t) + anchor_weight mean_t d mean_d (v(x_t) - v_ref(x_t))^2:

FlowBP Sparse's sum without nested terms, weighted by 1 - sigma_t instead of |D_t|, plus the velocity anchor
(`leapalign.flow.anchor`), which this method needs. `anchor_weight(beta, D)` converts. T forwards, and one for each
trained step in the backward pass, with one of the base.

Clipping: norms of g above a quantile of the batch's are scaled down to it; samples without gradient (above their
threshold) do not count. Defaults: all steps, quantile 0.8, as the authors' SD3.5 runs, which have beta 1.5e7 for HPS.

Departures: the hinge, see objective.py; the quantile is of the update's own batch, over all micro-batches and ranks,
where the authors' code takes that of the update before on the same rollouts, and 1 in their first. Our addition: a
share of the steps, drawn for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.rollout import Velocity, check_steps, grid_steps
from leapalign.methods.base import Samples, Surrogate, check_fraction
from leapalign.methods.single_steps import each_sample, replayed_steps
from leapalign.methods.step_sets import as_tensor, without_replacement

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RSMDraws(NamedTuple):
    """The trained steps: [K, B], or [T, 1] if all samples train all steps."""

    steps: Tensor


@dataclass(frozen=True, kw_only=True)
class RSM:
    """Reward score matching: the velocity at every step is regressed on the base's, moved by the reward's gradient."""

    name: ClassVar[str] = "rsm"
    same_forwards: ClassVar[bool] = True

    trained_share: float = 1.0
    """Share of the T steps that a sample trains, drawn for each sample; 1 is all."""
    gradient_quantile: float = 0.8
    """Quantile of the batch's norms of g above which g is clipped; 1 does not clip."""

    def __post_init__(self) -> None:
        check_fraction("RSM", "trained_share", self.trained_share)
        if not 0 < self.gradient_quantile <= 1:
            raise UserError(f"RSM: got gradient_quantile={self.gradient_quantile}, expected (0, 1]; 1 does not clip")

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> RSMDraws:
        """Draw round(trained_share T) different steps for each sample, at least 1; all sets equally likely."""
        count = max(1, round(self.trained_share * num_steps))
        if count == num_steps:
            return RSMDraws(as_tensor([tuple(range(num_steps, 0, -1))]).T)
        return RSMDraws(each_sample(lambda: without_replacement(1, num_steps, count, rng), samples))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: RSMDraws) -> Surrogate:
        """Run T forwards without graph, and K in the backward pass; the reward sees the rollout's x_0."""
        return self.surrogates(velocity, x, sigmas, [draws])[0]

    def surrogates(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Sequence[RSMDraws]) -> list[Surrogate]:
        """Roll out once; return a surrogate for each of the draws, whose forwards run in its backward pass."""
        import torch

        num_steps = grid_steps(sigmas, x)
        steps = torch.stack([d.steps for d in draws])  # [M, K, B] or [M, T, 1]
        check_steps(steps.unique().tolist(), num_steps)
        steps = steps.to(x.device)
        share = 1 / steps.shape[1]  # mean_t, of the anchor too
        x_0, predictions = replayed_steps(velocity, x, sigmas, steps, -share * (1 - sigmas[steps]), share)
        return [Surrogate(x_hat=x_hat, weight=x.new_ones(len(x)), x_0=x_0) for x_hat in predictions]

    def ceiling(self, norms: Sequence[float]) -> float:
        """Return the quantile of the norms that are not 0; 0 if all are. `norms`: of all samples of an update."""
        import torch

        moved = [norm for norm in norms if norm]
        return float(torch.tensor(moved, dtype=torch.float64).quantile(self.gradient_quantile)) if moved else 0.0

    def check_anchor(self, weight: float) -> None:
        """Raise UserError without an anchor to the base: the target would lie infinitely far from it."""
        if not weight > 0:
            raise UserError(
                f"rsm: got anchor_weight {weight}, but its target is v_ref - beta (1 - sigma) g with beta = D / (2 "
                "anchor_weight), D the numbers of a latent; set anchor_weight to a positive number (a smaller one goes "
                "further from the base)"
            )


def anchor_weight(beta: float, latent_numbers: int) -> float:
    """Return the `Run.anchor_weight` under which RSM's target is v_ref - beta (1 - sigma) g; D = `latent_numbers`."""
    if not (beta > 0 and math.isfinite(beta)):
        raise UserError(f"RSM: got beta={beta}, expected a positive number; the authors' is 1.5e7 for HPS on SD3.5")
    return latent_numbers / (2 * beta)

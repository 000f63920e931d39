"""FlowBP Sparse (arXiv 2606.11075): K random steps keep their gradient, every model input is stopped.

    x_0 = x_T + sum_A D_t f.v(sg x_t) + sum_{not A} D_t sg v_t,   D_t = sigma_{t-1} - sigma_t < 0
    f = 1 + gamma (sum_t |D_t| / sum_A |D_t| - 1)

f.v has the value of v and f times its gradient, so the values are the rollout's. A: K different steps, drawn one after
another with weight (T - t + 1)^b. The reward sees the rollout's x_0; no weighting. With every step active and gamma 0
this is DRTune without early stop. Defaults: FlowBP's for FLUX.1; SD3.5: K 4, b 1, gamma 0.5.

Departures: the active forwards are part of the rollout, T in all, where FlowBP runs them again after it (T + K), with
the same gradient; the hinge, see objective.py. Our addition: `step_draws` per-sample, whose K differentiated forwards
run in the backward pass at kept states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from leapalign.errors import UserError
from leapalign.flow.leap import discount
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import Samples, Surrogate
from leapalign.methods.flowbp import check_active, check_enough, compensation, step_sizes
from leapalign.methods.single_steps import each_sample, replayed_steps
from leapalign.methods.step_sets import as_tensor, weighted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

StepDraws = Literal["shared", "per-sample"]


class SparseDraws(NamedTuple):
    """The active steps A, noisiest first."""

    steps: tuple[int, ...]


class SparseSets(NamedTuple):
    """The active steps of each sample: [K, B]."""

    steps: Tensor


@dataclass(frozen=True, kw_only=True)
class FlowBPSparse:
    """FlowBP Sparse: K random differentiated steps with stopped inputs, scaled up for those left out."""

    name: ClassVar[str] = "flowbp-sparse"
    same_forwards: ClassVar[bool] = True

    num_training_steps: int = 3  # K
    """Differentiated steps."""
    image_side_bias: float = 2.0  # b
    """Exponent of the weights with which they are drawn; 0 is uniform, more prefers the image side."""
    compensation: float = 1.0  # gamma
    """Share, in [0, 1], of the other steps' part that the gradient is scaled up for."""
    step_draws: StepDraws = "shared"
    """Steps drawn for all samples that share a draw, or for each sample."""

    def __post_init__(self) -> None:
        check_active("FlowBPSparse", self.num_training_steps, self.image_side_bias, self.compensation)
        if self.step_draws not in get_args(StepDraws):
            raise UserError(f"FlowBPSparse: got step_draws={self.step_draws!r}, expected shared or per-sample")

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> SparseDraws | SparseSets:
        """Draw K different steps with weight (T - t + 1)^b."""
        check_enough("FlowBPSparse", self.num_training_steps, num_steps)

        def one() -> tuple[int, ...]:
            return weighted(1, num_steps, self.num_training_steps, self.image_side_bias, rng)

        return SparseDraws(one()) if self.step_draws == "shared" else SparseSets(each_sample(one, samples))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: SparseDraws | SparseSets) -> Surrogate:
        """Run T forwards, K with graph; SparseSets: T, and K in the backward pass. Metrics: mean active step, f."""
        if isinstance(draws, SparseSets):
            return self.surrogates(velocity, x, sigmas, [draws])[0]
        num_steps, sizes = grid_steps(sigmas, x), step_sizes(sigmas)
        check_steps(draws.steps, num_steps)
        factor = compensation(sum(sizes[t] for t in draws.steps), sum(sizes), self.compensation)
        for t in range(num_steps, 0, -1):
            if t in draws.steps:
                v = discount(velocity(x.detach(), sigmas[t]), factor)  # f.v(sg x_t): no step knows of another
            else:
                v = without_graph(velocity, x, sigmas[t])
            x = euler_step(x, v, sigmas[t], sigmas[t - 1])
        active = x.new_full((), sum(draws.steps) / len(draws.steps))
        return _surrogate(x, x.detach(), active, x.new_full((), factor))

    def surrogates(
        self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: Sequence[SparseDraws | SparseSets]
    ) -> list[Surrogate]:
        """Roll out once; return a surrogate for each of the draws, whose forwards run in its backward pass."""
        import torch

        grid_steps(sigmas, x)
        sets = [d.steps if isinstance(d, SparseSets) else as_tensor([d.steps]).T for d in draws]
        steps = torch.stack(sets).to(x.device)  # [M, K, B], or [M, K, 1] if shared
        sizes = sigmas[steps] - sigmas[steps - 1]  # |D_t|
        factor = compensation(sizes.sum(1, keepdim=True), float(sigmas[-1]), self.compensation)
        x_0, predictions = replayed_steps(velocity, x, sigmas, steps, -factor * sizes)
        means = zip(predictions, steps.to(x.dtype), factor)
        return [_surrogate(x_hat, x_0, of_set.mean(), f.mean()) for x_hat, of_set, f in means]


def _surrogate(x_hat: Tensor, x_0: Tensor, active: Tensor, factor: Tensor) -> Surrogate:
    weight = x_0.new_ones(len(x_0))
    return Surrogate(x_hat=x_hat, weight=weight, x_0=x_0, metrics={"active_step": active, "factor": factor})

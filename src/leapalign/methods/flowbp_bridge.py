"""FlowBP Bridge (arXiv 2606.11075): random steps on both sides of a step j, and the nested gradient through j.

    x_j = x_T + sum_{t>j} D_t f.v(sg x_t),   x_0 = x_j + D_j f.v(discount(x_j, alpha)) + sum_{t<j} D_t f.v(sg x_t)

Only active steps have a gradient; f.v has the value of v and f times its gradient, f as in Sparse, over all active
steps. So with U the gradient of x_j, the nested term is alpha f D_j J_v(x_j) U, which has f twice:

    dx_0 = U + f D_j dv(x_j) + alpha f D_j J_v(x_j) U + sum_{t<j} f D_t dv(x_t),   U = sum_{t>j} f D_t dv(x_t)

P(j) is proportional to T - j, j < T: the lower of two uniform steps. Of K active steps, K (T - j) / T, rounded half to
even, lie above j, at least 1 and at most K - 1; the others at j and below it, j always among them. Weights of the draws
are 1^b, 2^b, ... from the noise side, above j and anew below it. The reward sees the rollout's x_0; no weighting.
Defaults: FlowBP's for FLUX.1; SD3.5: K 5, b 4, gamma 0, alpha 0.5.

Departures: the active forwards are part of the rollout, T in all (FlowBP: T + K), with the same gradient; the hinge,
see objective.py. Samples share a draw (`Run.samples_per_draw` divides a batch): a j for each sample would differentiate
most steps for someone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.leap import discount
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import Samples, Surrogate
from leapalign.methods.flowbp import check_active, check_enough, check_share, compensation, step_sizes
from leapalign.methods.step_sets import weighted, without_replacement

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BridgeDraws(NamedTuple):
    """j: the bridge; active steps above and below it, noisiest first. j itself is always active."""

    j: int
    above: tuple[int, ...]
    below: tuple[int, ...]


def allocation(num_steps: int, num_training_steps: int, j: int) -> tuple[int, int]:
    """Return how many of K active steps lie above j, and at j or below it (j counts): both at least 1."""
    above = round(num_training_steps * (num_steps - j) / num_steps)  # half to even
    above = max(1, min(above, num_steps - j, num_training_steps - 1))
    return above, num_training_steps - above


@dataclass(frozen=True, kw_only=True)
class FlowBPBridge:
    """FlowBP Bridge: differentiated steps on both sides of a random one, through which the gradient is nested."""

    name: ClassVar[str] = "flowbp-bridge"
    same_forwards: ClassVar[bool] = True

    num_training_steps: int = 5  # K
    """Differentiated steps, at least 2."""
    image_side_bias: float = 2.0  # b
    """Exponent of the weights with which they are drawn; 0 is uniform, more prefers the image side."""
    compensation: float = 1.0  # gamma
    """Share, in [0, 1], of the other steps' part that the gradient is scaled up for."""
    nested_scale: float = 0.1  # alpha
    """Factor on the gradient through the input of the velocity at j, in [0, 1]."""

    def __post_init__(self) -> None:
        check_active("FlowBPBridge", self.num_training_steps, self.image_side_bias, self.compensation)
        check_share("FlowBPBridge", "nested_scale", self.nested_scale, "alpha")
        if self.num_training_steps < 2:
            raise UserError("FlowBPBridge: got num_training_steps=1, expected at least 2: one above j, and j itself")

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> BridgeDraws:
        """Draw j with P(j) ~ T - j, then the active steps above and below it."""
        check_enough("FlowBPBridge", self.num_training_steps, num_steps)
        _, j = without_replacement(1, num_steps, 2, rng)
        above, rest = allocation(num_steps, self.num_training_steps, j)
        return BridgeDraws(
            j=j,
            above=weighted(j + 1, num_steps, above, self.image_side_bias, rng),
            below=weighted(1, j - 1, rest - 1, self.image_side_bias, rng) if rest > 1 else (),
        )

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: BridgeDraws) -> Surrogate:
        """Run T forwards, K with graph. Metrics: j, and the factor f."""
        num_steps, sizes = grid_steps(sigmas, x), step_sizes(sigmas)
        active = _active(draws, num_steps)
        factor = compensation(sum(sizes[t] for t in active), sum(sizes), self.compensation)
        for t in range(num_steps, 0, -1):
            if t == draws.j:
                v = discount(velocity(discount(x, self.nested_scale), sigmas[t]), factor)
            elif t in active:
                v = discount(velocity(x.detach(), sigmas[t]), factor)  # f.v(sg x_t): only j knows of others
            else:
                v = without_graph(velocity, x, sigmas[t])
            x = euler_step(x, v, sigmas[t], sigmas[t - 1])
        metrics = {"j": x.new_full((), draws.j), "factor": x.new_full((), factor)}
        return Surrogate(x_hat=x, weight=x.new_ones(len(x)), x_0=x.detach(), metrics=metrics)


def _active(draws: BridgeDraws, num_steps: int) -> tuple[int, ...]:
    """Return all active steps. Raises UserError for draws of another grid."""
    active = (*draws.above, draws.j, *draws.below)
    check_steps(active, num_steps)
    if list(active) != sorted(set(active), reverse=True):
        raise UserError(f"FlowBPBridge: got draws {tuple(draws)}, expected steps above j, and steps below j")
    return active

"""FlowBP Lagrange (arXiv 2606.11075): two leaps x_k -> x_j -> x_0 by quadrature over states that the rollout passes.

A leap s -> e has the steps s, ..., e + 1 as candidates; n = `num_supports` of them, evenly spaced, the first and the
last included (never e itself), are its supports. w_i is the integral from sigma_s to sigma_e of the i-th Lagrange
polynomial through the supports' times: a velocity that is a polynomial of degree n - 1 along the rollout is integrated
exactly, and the w_i may have either sign. With w of the first leap and u of the second:

    x_j = x_k + sum_i w_i (f_1 s_i).v(x_i),   x_0 = x_j + sum_i u_i (f_2 s_i).v(x_i)
    f = 1 + gamma (sum_i |w_i| / (|w_1| + |w_2|) - 1),   s = 1, 0.25, 0, 0, ...

g.v has the value of v and g times its gradient, so only the first two supports of a leap have one. A connector at x_j,
where the velocity's input is discount(x_j, alpha), and one at x_0; other inputs are stopped:

    dx_0 = U + alpha f_2 u_1 J_v(x_j) U + f_2 [u_1 dv(x_j) + 0.25 u_2 dv(x_n)],
    U = f_1 [w_1 dv(x_k) + 0.25 w_2 dv(x_m)]

A sample's weight is LeapAlign's, 1 / (max(d_j, tau) + max(d_0, tau)), with distances before the connectors. (k, j): T
steps are cut into an image side A, a gap B and a noise side C, with shares drawn from Dirichlet(2.5, 6, 2); j = A + 1
and k = A + B + 1. Defaults: FlowBP's for FLUX.1; SD3.5: gamma 0, and A of at most 10 of 25 steps
(`longest_image_side` 0.4).

Departures: the supports are part of the rollout, T forwards in all (FlowBP: T + 4), with the same gradient; the hinge,
see objective.py; the Dirichlet draw is made by Python's generator, from the seed. Samples share a draw, as in Bridge.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from leapalign.errors import UserError
from leapalign.flow.leap import connect, discount, mean_distance
from leapalign.flow.rollout import Velocity, check_steps, euler_step, grid_steps, without_graph
from leapalign.methods.base import Samples, Surrogate, check_positive, uniform_integer
from leapalign.methods.flowbp import check_share, compensation
from leapalign.methods.leapalign import similarity_weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ACTIVE = 2  # leading supports of a leap that have a gradient
CONCENTRATIONS = (2.5, 6.0, 2.0)  # of the shares of image side, gap and noise side
MOST_SUPPORTS = 8  # Lagrange polynomials through more even points swing


class LagrangeDraws(NamedTuple):
    """The steps from which the two leaps start, k > j >= 2."""

    k: int
    j: int


class Support(NamedTuple):
    """A velocity's part in a leap."""

    weight: float  # w_i
    gradient: float  # factor on its gradient; 0 if not active


@dataclass(frozen=True, kw_only=True)
class FlowBPLagrange:
    """FlowBP Lagrange: LeapAlign's two leaps, each a quadrature over several states, two of them differentiated."""

    name: ClassVar[str] = "flowbp-lagrange"
    same_forwards: ClassVar[bool] = False

    num_supports: int = 3
    """States of a leap whose velocities are integrated (FlowBP's order), 1 to 8."""
    compensation: float = 0.5  # gamma
    """Share, in [0, 1], of the other supports' part that a leap's gradient is scaled up for."""
    second_scale: float = 0.25
    """Factor on the gradient of a leap's second support, in [0, 1]."""
    nested_scale: float = 0.1  # alpha
    """Factor on the gradient through the input of the velocity at j, in [0, 1]."""
    distance_floor: float = 0.2  # tau
    """Lower bound of the distances in the weight."""
    longest_image_side: float = 1.0
    """Largest share of the T steps for the image side A; what is more goes to the noise side."""

    def __post_init__(self) -> None:
        check_positive("FlowBPLagrange", "num_supports", self.num_supports)
        if self.num_supports > MOST_SUPPORTS:
            raise UserError(f"FlowBPLagrange: got num_supports={self.num_supports}, expected at most {MOST_SUPPORTS}")
        check_share("FlowBPLagrange", "compensation", self.compensation, "gamma")
        check_share("FlowBPLagrange", "second_scale", self.second_scale, "a factor")
        check_share("FlowBPLagrange", "nested_scale", self.nested_scale, "alpha")
        check_share("FlowBPLagrange", "longest_image_side", self.longest_image_side, "a share of the steps")
        if not self.distance_floor > 0:
            raise UserError(f"FlowBPLagrange: got distance_floor={self.distance_floor}, expected tau > 0; FlowBP: 0.2")

    def draw(self, num_steps: int, rng: torch.Generator, samples: Samples) -> LagrangeDraws:
        """Draw (k, j) by the lengths of three segments; raises UserError for fewer than 3 steps."""
        if num_steps < 3:
            raise UserError(f"FlowBPLagrange: got {num_steps} sampling steps, expected at least 3; use more steps")
        source = random.Random(uniform_integer(0, 2**62, rng))  # torch's Dirichlet takes no generator
        gammas = [source.gammavariate(concentration, 1.0) for concentration in CONCENTRATIONS]
        longest = floor(self.longest_image_side * num_steps + 1e-9)  # 0.29 * 100 is 28.999…
        return segment_starts([g / sum(gammas) for g in gammas], num_steps, max(1, longest))

    def __call__(self, velocity: Velocity, x: Tensor, sigmas: Tensor, draws: LagrangeDraws) -> Surrogate:
        """Run T forwards, one or two of each leap with graph. Metrics: k, j, both factors, d_j and d_0 [B]."""
        (k, j), num_steps = draws, grid_steps(sigmas, x)
        check_steps(draws, num_steps)
        if not j < k:
            raise UserError(f"FlowBPLagrange: got draws {tuple(draws)}, expected k > j")
        first, second = self.supports(sigmas, k, j), self.supports(sigmas, j, 0)
        supports, x_hat, distances = first | second, x, []
        for t in range(num_steps, 0, -1):
            if t == k:
                x_hat = x
            if t == j:
                distances.append(mean_distance(x, x_hat))  # before the connector makes them equal
                x_hat = connect(x_hat, x)
            weight, gradient = supports.get(t, (0.0, 0.0))
            if gradient:
                v = velocity(discount(x_hat, self.nested_scale) if t == j else x, sigmas[t])
            else:
                v = without_graph(velocity, x, sigmas[t])
            if weight:
                x_hat = x_hat + weight * discount(v, gradient).to(x.dtype)
            x = euler_step(x, v.detach(), sigmas[t], sigmas[t - 1])  # the real rollout is a constant
        distances.append(mean_distance(x, x_hat))
        steps = {"k": x.new_full((), k), "j": x.new_full((), j)}
        factors = {"factor_kj": x.new_full((), first[k].gradient), "factor_j0": x.new_full((), second[j].gradient)}
        return Surrogate(
            x_hat=connect(x_hat, x),
            weight=similarity_weight(distances, self.distance_floor, "both"),
            x_0=x,
            metrics=steps | factors | {"d_j": distances[0], "d_0": distances[1]},
        )

    def supports(self, sigmas: Tensor, start: int, end: int) -> dict[int, Support]:
        """Return step -> support of the leap start -> end, noisiest first."""
        steps = support_steps(start, end, self.num_supports)
        times = sigmas.tolist()
        weights = quadrature_weights([times[t] for t in steps], times[start], times[end])
        sizes = [abs(w) for w in weights]
        factor = compensation(sum(sizes[:ACTIVE]), sum(sizes), self.compensation)  # unscaled: without second_scale
        factors = [factor, factor * self.second_scale, *[0.0] * len(steps)]
        return {t: Support(w, f) for t, w, f in zip(steps, weights, factors)}


def segment_starts(shares: list[float], num_steps: int, longest_image_side: int) -> LagrangeDraws:
    """Cut T steps by the shares of image side A, gap B and noise side C; return k = A + B + 1, j = A + 1.

    Lengths are rounded, and what is then missing or too much goes to the largest share; each is at least 1, at the cost
    of the longest; what A has beyond `longest_image_side` goes to C.
    """
    lengths = [round(share * num_steps) for share in shares]
    lengths[shares.index(max(shares))] += num_steps - sum(lengths)
    lengths = [max(1, length) for length in lengths]
    lengths[lengths.index(max(lengths))] += num_steps - sum(lengths)
    image, gap, _ = lengths
    image = min(image, longest_image_side)
    return LagrangeDraws(k=image + gap + 1, j=image + 1)


def support_steps(start: int, end: int, number: int) -> list[int]:
    """Return `number` of the steps start, ..., end + 1, evenly spaced (half to even) with both ends; all if fewer."""
    candidates = list(range(start, end, -1))
    if len(candidates) <= number:
        return candidates
    if number == 1:
        return candidates[:1]
    last = len(candidates) - 1
    return [candidates[round(i * last / (number - 1))] for i in range(number)]


def quadrature_weights(times: list[float], start: float, end: float) -> list[float]:
    """Return the integrals from `start` to `end` of the Lagrange polynomials through `times`: exact to degree n - 1.

    In u = (time - start) / (end - start) they solve sum_i w_i u_i^p = 1 / (p + 1) for p = 0..n-1.
    """
    import torch

    length = end - start
    u = torch.tensor([(time - start) / length for time in times], dtype=torch.float64)
    powers = torch.arange(len(times), dtype=torch.float64)[:, None]
    return (length * torch.linalg.solve(u**powers, 1 / (powers + 1))).flatten().tolist()

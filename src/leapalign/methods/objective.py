"""The hinge objective and its gradient at the latent (arXiv 2604.15311, Eqs. 11 and 13).

    loss = sum_n w_n l_n / B,   l_n = sum_i weight_i max(0, lambda_i - r_i(x_n))

The gradient is computed at the latent first, in chunks whose graphs are freed one by one, so that the graphs of reward
and model are never in memory together; `surrogate.backward(result.grad)` then propagates it through the model.

Several rewards: the hinge stops a reward at its threshold. If gradient norms differ by orders of magnitude (HPSv2.1's
cosine beside HPSv3's tens), the largest still dominates; `unit_gradient` scales each term's gradient to norm 1 before
weights, per sample, so that accumulation changes nothing.

Departures: Algorithm 1 prints -w grad r; we use the hinge, as the text (Eq. 11) and ReFL do. Several rewards are
our addition. DRaFT-LV's copies are summed, as Algorithm 1 does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from leapalign.errors import UserError
from leapalign.flow.leap import per_sample
from leapalign.methods.base import Surrogate

if TYPE_CHECKING:
    from torch import Tensor

Score: TypeAlias = "Callable[[Tensor, list[int]], Mapping[str, Tensor]]"
"""score(latents [n, ...], rows) -> {name: rewards [n]}, differentiable; rows[i] is the sample of latents[i]."""


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """One reward's term in the loss: weight * max(0, threshold - r)."""

    threshold: float  # lambda, Eq. 11, in the reward's own scale
    weight: float = 1.0
    unit_gradient: bool = False  # scale its gradient at each sample's latent to norm 1; the loss value is unchanged


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentGradient:
    """The objective at one surrogate. Tensors have no graph and are at least float32."""

    loss: Tensor  # 0-dim; its sum over micro-batches is the batch's loss
    grad: Tensor  # [N, ...] d loss / d x_hat
    rewards: dict[str, Tensor]  # [N] each
    hinges: dict[str, Tensor]  # [N] each: max(0, lambda - r), without weights
    slopes: dict[str, Tensor]  # [N] per unit_gradient term: the norm of its hinge's gradient before scaling

    @property
    def reward(self) -> Tensor:
        """Return the reward [N], or the plain sum of several."""
        return sum(self.rewards.values())  # type: ignore[return-value]

    @property
    def below(self) -> Tensor:
        """Return [N] bool: rows with a gradient, because some reward is below its threshold (or NaN)."""
        return sum((h != 0).int() for h in self.hinges.values()) > 0  # type: ignore[return-value]

    @property
    def has_gradient(self) -> bool:
        """False if every sample lies above every threshold: the update is skipped and counted."""
        return bool(self.below.any())


def latent_gradient(
    surrogate: Surrogate, score: Score, terms: Mapping[str, Hinge], chunk: int = 0, batch_size: int = 0
) -> LatentGradient:
    """Score the surrogate's latents and return the loss with its gradient there.

    `chunk`: latents scored at once (0 = all). `batch_size`: number of samples in the whole batch, by which the loss is
    divided (0 = the surrogate's own B), so that gradients of micro-batches add up to the batch's.
    Raises UserError if a reward is missing, has another shape than [n], or has no graph.
    """
    import torch

    batch = len(surrogate.x_hat) // surrogate.copies
    parts = []
    for rows in _chunks(len(surrogate.x_hat), chunk):
        latents = surrogate.x_hat[rows].detach().requires_grad_()  # a leaf: the model's graph stays out of it
        with torch.enable_grad():
            rewards = _checked(score(latents, [n % batch for n in range(rows.start, rows.stop)]), terms, len(latents))
            hinges = {name: (terms[name].threshold - r).relu() for name, r in rewards.items()}  # Eq. 11
            weight = surrogate.weight[rows] / (batch_size or batch)  # Eq. 13
            grad, slopes = _gradient(latents, hinges, terms, weight)
        loss = (weight * sum(terms[name].weight * h.detach() for name, h in hinges.items())).sum()
        parts.append((loss, grad, _detached(rewards), _detached(hinges), slopes))
    losses, grads, *named = zip(*parts)
    rewards, hinges, slopes = map(_joined, named)
    return LatentGradient(
        loss=torch.stack(losses).sum(), grad=torch.cat(grads), rewards=rewards, hinges=hinges, slopes=slopes
    )


def reweighted(
    result: LatentGradient, terms: Mapping[str, Hinge], old: Tensor, new: Tensor, batch_size: int
) -> LatentGradient:
    """Return the objective at the same latents with other weights [N] of the samples.

    `old`: the weights of `result`, positive. For methods that use a rollout, and its reward's gradient, again.
    """
    hinges = sum(terms[name].weight * hinge for name, hinge in result.hinges.items())
    grad = result.grad * per_sample((new / old).to(result.grad.dtype), result.grad)
    return replace(result, grad=grad, loss=(new / batch_size * hinges).sum())


def _gradient(
    latents: Tensor, hinges: dict[str, Tensor], terms: Mapping[str, Hinge], weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return d (sum_n weight_n l_n) / d latents, and the norms before scaling to 1 (Hinge.unit_gradient).

    Frees the chunk's graph; no weight of a reward gets a .grad.
    """
    import torch

    unit = [name for name in hinges if terms[name].unit_gradient]
    plain = [terms[name].weight * h for name, h in hinges.items() if name not in unit]
    passes = [hinges[name].sum() for name in unit] + ([(weight * sum(plain)).sum()] if plain else [])
    grads = [torch.autograd.grad(loss, latents, retain_graph=loss is not passes[-1])[0] for loss in passes]
    slopes = {name: grad.detach().flatten(1).norm(dim=1) for name, grad in zip(unit, grads)}
    for i, name in enumerate(unit):
        factor = terms[name].weight * weight / torch.where(slopes[name] == 0, 1, slopes[name])  # NaN stays NaN
        grads[i] = grads[i] * factor.to(grads[i].dtype).view(-1, *[1] * (latents.ndim - 1))
    return sum(grads[1:], grads[0]), slopes


def _chunks(count: int, size: int) -> Iterator[slice]:
    size = size or count
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _checked(rewards: Mapping[str, Tensor], terms: Mapping[str, Hinge], count: int) -> dict[str, Tensor]:
    """Return the rewards that have a term, in at least float32."""
    import torch

    if not terms or rewards.keys() != terms.keys():
        raise UserError(f"objective: score gave {sorted(rewards)}, terms are for {sorted(terms)}; use the same names")
    for name, r in rewards.items():
        if r.shape != (count,):
            raise UserError(f"reward {name}: got shape {list(r.shape)} for {count} latents, expected [{count}]")
        if not r.requires_grad:
            raise UserError(f"reward {name}: it carries no gradient; direct-gradient methods need a differentiable one")
    return {name: r.to(torch.promote_types(r.dtype, torch.float32)) for name, r in rewards.items()}


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in tensors.items()}


def _joined(parts: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

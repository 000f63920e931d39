"""Metrics of an update over the whole batch, on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from leapalign.distributed.world import World
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import LatentGradient
from leapalign.training.tracking import Metrics

BY_STEPS = "by_steps"  # name of the metric that is a table


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Numbers of one micro-batch; all tensors are small and without graph."""

    method: dict[str, Tensor]  # the method's own metrics
    result: LatentGradient  # with an empty `grad`
    trained: bool  # True if it added to the gradients
    steps: dict[str, Tensor] = field(default_factory=dict)  # [M, B] each: the steps of each sample's M sets
    by_steps: dict[str, Tensor] = field(default_factory=dict)  # [M, B] each: what was measured there


def part_of(
    surrogate: Surrogate, result: LatentGradient, trained: bool, others: dict[str, Tensor], batch_size: int
) -> Part:
    """Collect the numbers of a micro-batch that the metrics need, after its backward.

    `others`: 0-dim or [B], beside the method's own. `batch_size`: samples of the whole batch; gradients by steps are
    multiplied by it, which makes them those of a sample's own loss.
    """
    method = {"weight": surrogate.weight.detach()} | surrogate.metrics | others
    result = replace(result, grad=result.grad.new_empty(0))
    if (found := surrogate.by_steps) is None:
        return Part(method=method, result=result, trained=trained)
    gradients = {name: batch_size * norms for name, norms in found.gradients().items()}
    method |= {name: norms.mean(0) for name, norms in gradients.items()}
    by_steps = found.values | gradients
    return Part(method=method, result=result, trained=trained, steps=found.steps, by_steps=by_steps)


def batch_metrics(parts: list[Part]) -> Metrics:
    """Return one line of metrics.jsonl, without gradient norm and time."""
    results = [part.result for part in parts]
    reward = torch.cat([result.reward for result in results])
    below = torch.cat([result.below for result in results]).float().mean()
    means = {
        "loss": sum((result.loss for result in results[1:]), results[0].loss),
        "reward": reward.mean(),
        "reward_std": reward.std(correction=0),
        "fraction_above_threshold": 1 - below.double(),
    }
    if len(results[0].rewards) > 1:
        for name in results[0].rewards:
            means[f"reward/{name}"] = torch.cat([r.rewards[name] for r in results]).mean()
            means[f"hinge/{name}"] = torch.cat([r.hinges[name] for r in results]).mean()
    for name in results[0].slopes:
        means[f"slope/{name}"] = torch.cat([r.slopes[name] for r in results]).mean()
    for name in parts[0].method:
        means[name] = torch.stack([part.method[name].float().mean() for part in parts]).mean()
    found = dict(zip(means, torch.stack([mean.double() for mean in means.values()]).tolist()))
    return found | ({BY_STEPS: table_by_steps(parts)} if parts[0].steps else {})


def table_by_steps(parts: list[Part]) -> dict[str, list[float]]:
    """Return means over the samples that have the same steps: columns of equal length, a row for each set of steps.

    The columns are the steps (k, j), `samples` (their number) and what was measured, with four digits.
    """
    every = [part.steps | part.by_steps for part in parts]
    columns = [torch.cat([each[name].flatten() for each in every]).double() for name in every[0]]
    groups: dict[tuple[int, ...], list[list[float]]] = {}
    for row in torch.stack(columns, dim=1).tolist():
        steps = tuple(int(t) for t in row[: len(parts[0].steps)])
        groups.setdefault(steps, []).append(row[len(steps) :])
    rows = [
        (*steps, len(group), *(float(f"{sum(values) / len(group):.4g}") for values in zip(*group)))
        for steps, group in sorted(groups.items())
    ]
    names = [*parts[0].steps, "samples", *parts[0].by_steps]
    return {name: list(column) for name, column in zip(names, zip(*rows))}


def of_all_ranks(world: World, parts: list[Part]) -> list[Part]:
    """Gather the parts of all ranks, in the order of the samples, on every rank."""
    if world.size == 1:
        return parts
    return [part for round in zip(*world.gather([_on_cpu(part) for part in parts])) for part in round]


def _on_cpu(part: Part) -> Part:
    r = part.result
    named = {"rewards": _copied(r.rewards), "hinges": _copied(r.hinges), "slopes": _copied(r.slopes)}
    result = replace(r, loss=r.loss.cpu(), grad=r.grad.cpu(), **named)
    steps, by_steps = _copied(part.steps), _copied(part.by_steps)
    return replace(part, method=_copied(part.method), result=result, steps=steps, by_steps=by_steps)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()}

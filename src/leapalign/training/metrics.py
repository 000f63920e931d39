"""Metrics of an update over the whole batch, on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leapalign.distributed.world import World
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import LatentGradient
from leapalign.training.tracking import Metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Numbers of one micro-batch; all tensors are small and without graph."""

    method: dict[str, Tensor]  # the method's own metrics
    result: LatentGradient  # with an empty `grad`
    trained: bool  # True if it added to the gradients


def part_of(surrogate: Surrogate, result: LatentGradient, trained: bool, others: dict[str, Tensor]) -> Part:
    """Collect the numbers of a micro-batch that the metrics need; `others`: 0-dim or [B], beside the method's own."""
    method = {"weight": surrogate.weight.detach()} | surrogate.metrics | others
    return Part(method=method, result=replace(result, grad=result.grad.new_empty(0)), trained=trained)


def batch_metrics(parts: list[Part]) -> Metrics:
    """Return one line of metrics.jsonl, without gradient norm and time. Synchronises with the device once."""
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
    return dict(zip(means, torch.stack([mean.double() for mean in means.values()]).tolist()))


def of_all_ranks(world: World, parts: list[Part]) -> list[Part]:
    """Gather the parts of all ranks, in the order of the samples, on every rank."""
    if world.size == 1:
        return parts
    return [part for round in zip(*world.gather([_on_cpu(part) for part in parts])) for part in round]


def _on_cpu(part: Part) -> Part:
    r = part.result
    named = {"rewards": _copied(r.rewards), "hinges": _copied(r.hinges), "slopes": _copied(r.slopes)}
    return replace(part, method=_copied(part.method), result=replace(r, loss=r.loss.cpu(), grad=r.grad.cpu(), **named))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()}

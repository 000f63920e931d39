"""What a step is judged by: over the whole batch, whichever ranks its samples were on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from leapalign.distributed.world import World
from leapalign.methods.objective import LatentGradient
from leapalign.training.tracking import Metrics

Part = tuple[dict[str, Tensor], LatentGradient]  # of a micro-batch: the method's metrics, the objective


def batch_metrics(parts: list[Part]) -> Metrics:
    """One line of metrics.jsonl, without norm and time."""
    results = [result for _, result in parts]
    reward = torch.cat([result.reward for result in results])
    metrics = {
        "loss": float(sum(result.loss for result in results)),
        "reward": float(reward.mean()),
        "reward_std": float(reward.std(correction=0)),
        "fraction_above_threshold": 1 - float(torch.cat([result.below for result in results]).float().mean()),
    }
    if len(results[0].rewards) > 1:
        for name in results[0].rewards:
            metrics[f"reward/{name}"] = float(torch.cat([r.rewards[name] for r in results]).mean())
            metrics[f"hinge/{name}"] = float(torch.cat([r.hinges[name] for r in results]).mean())
    for name in results[0].slopes:
        metrics[f"slope/{name}"] = float(torch.cat([r.slopes[name] for r in results]).mean())
    own = {name: torch.stack([m[name].float().mean() for m, _ in parts]).mean() for name in parts[0][0]}
    return metrics | {name: float(value) for name, value in own.items()}


def of_all_ranks(world: World, parts: list[Part]) -> list[Part]:
    """What metrics are made of, in the order of the samples."""
    if world.size == 1:
        return parts
    own = [(_on_cpu(metrics), _small(result)) for metrics, result in parts]
    return [part for round in zip(*world.gather(own)) for part in round]


def _small(result: LatentGradient) -> LatentGradient:
    """Without the gradient, on the CPU."""
    named = {name: _on_cpu(getattr(result, name)) for name in ("rewards", "hinges", "slopes")}
    return replace(result, loss=result.loss.cpu(), grad=result.grad[:0].cpu(), **named)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()}

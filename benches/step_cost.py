"""Step cost: a LeapAlign update over the sum of its parts, each measured alone with the same modules and batch.

    python benches/step_cost.py --repeats 20 > step_cost.json

The parts, at T sampling steps (guidance included, so a "forward" is both branches where there are two):
- rollout:   T - 2 forwards without graph;
- leaps:     2 forwards with graph, the second from where the first leap lands, and the backward through both;
- reward:    decode, reward and hinge, forward and backward to the latent (decode in one chunk, as in the run);
- optimizer: AdamW and EMA.
What an update does beyond them (encoding, noise, draws, connectors, distances, checks for NaN, gradient norm and
clipping, metrics) is overhead: `ratio` = update / sum of the parts, the median over repeats in which update and parts
take turns. Learning rate 0 keeps the weights as they are; AdamW costs the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
import tyro
from shared import Batch, facts, first_batch, gradient_at_latent, synchronized, with_folders

from leapalign.flow.leap import leap
from leapalign.flow.rollout import without_graph
from leapalign.methods.base import Surrogate
from leapalign.recipes import shapeworld_leapalign
from leapalign.training.direct import update
from leapalign.training.engine import Engine, build

TARGET = 1.05


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Time of a LeapAlign update over the sum of its parts, as JSON on stdout."""

    repeats: int = 20
    warmup: int = 2
    """Repeats that are not counted."""
    batch_size: int = 32
    steps: int = 16
    """T, sampling steps of the rollout."""
    threads: int = 0
    """Of torch; 0 = as it starts."""
    generator: str = "embedded:generator"
    reward: str = "embedded:reward"
    device: str = "cpu"


def measure(bench: StepCost) -> dict[str, object]:
    """Interleaved repeats of the update and of each part."""
    if bench.threads:
        torch.set_num_threads(bench.threads)
    engine = engine_of(bench)
    actions = {"update": lambda: _update(engine)} | parts(engine, first_batch(engine))
    rounds = [_round(engine, actions, turn) for turn in range(bench.warmup + bench.repeats)][bench.warmup :]
    return summary(rounds) | facts(bench)


def engine_of(bench: StepCost) -> Engine:
    """The ShapeWorld LeapAlign recipe, whole batch at once, everything of the graph kept."""
    recipe = with_folders(shapeworld_leapalign(), bench.generator, bench.reward)
    size = bench.batch_size
    run = replace(
        recipe, batch_size=size, micro_batch_size=size, steps=1, evaluation_size=1, num_sampling_steps=bench.steps
    )
    return build(replace(run, learning_rate=0.0, graph="all", device=bench.device))


def parts(engine: Engine, batch: Batch) -> dict[str, Callable[[], None]]:
    """Each part as an action; `leaps` leaves the gradients that `optimizer` uses."""
    sigmas, x, velocity = engine.sigmas, batch.noise, batch.velocity
    num_steps = len(sigmas) - 1
    k, j = sigmas[num_steps], sigmas[num_steps // 2]
    ones = torch.ones_like(x)

    def rollout() -> None:
        for t in range(num_steps, 2, -1):
            without_graph(velocity, x, sigmas[t])

    def leaps() -> None:
        x_j = leap(x, velocity(x, k), k, j)
        leap(x_j, velocity(x_j, j), j, sigmas[0]).backward(ones)

    def reward() -> None:
        gradient_at_latent(engine, batch, Surrogate(x_hat=x, weight=x.new_ones(len(x))))

    def optimizer() -> None:
        engine.optimizer.step()
        engine.ema.update()

    return {"rollout": rollout, "leaps": leaps, "reward": reward, "optimizer": optimizer}


def _update(engine: Engine) -> None:
    if update(engine, 0)["skipped"]:
        raise SystemExit("the update had no gradient, so there is nothing to measure: raise the reward's threshold")


def _round(engine: Engine, actions: dict[str, Callable[[], None]], turn: int) -> dict[str, float]:
    """Every action once; who comes first changes from round to round, the order stays (optimizer after leaps)."""
    names = list(actions)
    first = turn % len(names)
    return {name: _seconds(engine, name, actions[name]) for name in names[first:] + names[:first]}


def _seconds(engine: Engine, name: str, action: Callable[[], None]) -> float:
    if name == "leaps":  # as the update: gradients are made, not added to
        engine.optimizer.zero_grad(set_to_none=True)
    action = synchronized(action)
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def summary(rounds: list[dict[str, float]]) -> dict[str, object]:
    """Medians in seconds, and the median of the rounds' ratios with its quartiles."""
    ratios = [each["update"] / sum(v for name, v in each.items() if name != "update") for each in rounds]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    seconds = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
        "ratio_of_medians": seconds["update"] / sum(v for name, v in seconds.items() if name != "update"),
        "target": TARGET,
        "reached": median(ratios) <= TARGET,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(StepCost)), indent=2))

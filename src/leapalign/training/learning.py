"""A value model within a run (leapalign.rewards.value_model): what an update shows it, and what it is believed.

In update t the value model is fixed. It scores the batch, its gradient trains the policy if it is believed, and the
true reward scores the same images. After the policy's step it is held against these new scores and then trains on
them, so its parity is always that on samples it has not seen, and decides over update t + 1.

Not believed, its hinge has no gradient: alone, it leaves the policy, its average and its optimiser as they are, bit for
bit, and the update counts in `skipped`. Beside other rewards it is left out.

Every rank sees the samples of all ranks in their order and takes the same steps with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leapalign.methods.objective import Hinge
from leapalign.rewards.value_model.model import joined, ordered
from leapalign.seeds import generator
from leapalign.training.engine import Engine
from leapalign.training.tracking import Metrics

BELIEVED = "value/believed"


def terms(engine: Engine) -> Mapping[str, Hinge]:
    """Return the terms of the loss; a value model that is not believed has a hinge without gradient."""
    name = engine.value_model
    if not name or engine.learner.believed:
        return engine.terms
    return engine.terms | {name: replace(engine.terms[name], threshold=-math.inf)}


def policy_rests(engine: Engine) -> bool:
    """Return True if the value model is the only reward, and is not believed: then nothing trains the policy."""
    return bool(engine.value_model) and len(engine.terms) == 1 and not engine.learner.believed


def collect(engine: Engine, count: int) -> dict[str, Tensor]:
    """Keep what the value model saw of a micro-batch of `count` samples; return true rewards, to check if finite.

    Copies of a sample become neighbours, so that neither micro-batches nor chunks change the order.
    """
    if not engine.value_model:
        return {}
    seen = joined(engine.learner.seen)
    engine.learner.seen.clear()
    engine.fresh.append(ordered(seen, torch.arange(len(seen.true)).view(-1, count).T.flatten()))
    return {f"the reward that {engine.value_model} learns": seen.true.to(engine.sigmas.device)}


def forget(engine: Engine) -> None:
    """Forget the samples of an update that is left out."""
    engine.fresh.clear()
    if engine.value_model:
        engine.learner.seen.clear()


def learn(engine: Engine, step: int) -> Metrics:
    """Let the value model learn from this update's samples of all ranks; return its metrics."""
    if not engine.value_model:
        return {}
    learner = engine.learner
    found: Metrics = {BELIEVED: int(learner.believed)}  # as in this update
    fresh = joined([samples for round in zip(*engine.world.gather(list(engine.fresh))) for samples in round])
    engine.fresh.clear()
    draws = generator(engine.run.seed, step=step, sample=0, purpose="value model")
    return found | {f"value/{name}": value for name, value in learner.learn(fresh, draws).items()}

"""Evaluation reward on a fixed set of prompts and noises, with averaged weights: comparable between methods.

The training reward is noisy and differs in meaning between methods (ReFL's reward sees a leapt prediction). The set
depends only on `evaluation_seed` and the prompts.
"""

from __future__ import annotations

import torch

from leapalign.flow.rollout import rollout
from leapalign.training import batches
from leapalign.training.engine import Engine
from leapalign.training.tracking import Metrics


@torch.no_grad()
def evaluation_reward(engine: Engine) -> Metrics:
    """Return the mean r(x_0) over the set as `evaluation_reward` (several rewards: sum, and `evaluation_reward/NAME`).

    Every rank must call it; each scores its part of the set.
    """
    texts = batches.evaluation_prompts(engine.run, engine.prompts)
    size = engine.run.micro_batch_size
    begin, stride = engine.world.rank * size, engine.world.size * size
    totals = torch.zeros(len(engine.rewards), dtype=torch.float64)
    with engine.ema.applied():
        for start in range(begin, len(texts) + begin, stride):
            totals += _sums(engine, texts, range(start, min(start + size, len(texts))), start)
    engine.world.sum_([totals])
    means = {name: float(total) / len(texts) for name, total in zip(engine.rewards, totals)}
    parts = {f"evaluation_reward/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
    return {"evaluation_reward": sum(means.values())} | parts


def _sums(engine: Engine, texts: list[str], rows: range, start: int) -> torch.Tensor:
    """Return each reward [R], summed over these rows of the set; zeros for no rows."""
    run = engine.run
    made = rows or range(1)  # no rows left: an unused forward, because sharded ranks must all run it
    if engine.rewards_in_step:
        made = [min(row, len(texts) - 1) for row in range(start, start + run.micro_batch_size)]
    prompts = [texts[row] for row in made]
    noise = engine.model.noise(batches.noise_generators(run.evaluation_seed, 0, made, "fixed set noise"))
    with engine.rollout():
        x_0 = rollout(engine.velocity(prompts), noise.to(engine.sigmas.device), engine.sigmas)
    scores = engine.score(prompts, x_0, range(len(prompts))).values()
    return torch.stack([reward[: len(rows)].sum().double() for reward in scores]).cpu()

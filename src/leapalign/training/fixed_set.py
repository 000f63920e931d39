"""Evaluations during training: the training reward and monitors on a fixed set of prompts and noises.

The training reward of a batch is noisy and differs in meaning between methods (ReFL's reward sees a leapt prediction).
The set depends only on `evaluation_seed` and the prompts, and is drawn with the averaged weights, so that evaluations
are comparable between steps, methods and numbers of ranks.

Image 0 of each of `evaluation_size` prompts is scored by rewards; of the first `diversity_prompts` prompts more images
are drawn. No image is kept: a micro-batch leaves a few numbers for each (a `Record`), which all ranks exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from leapalign.evaluation.image_statistics import image_statistics
from leapalign.flow.rollout import Velocity, rollout
from leapalign.prompts.base import Prompt, spread
from leapalign.training import batches
from leapalign.training.engine import Engine
from leapalign.training.monitors import DRIFT, HELD_OUT, IMAGE
from leapalign.training.numbers import FEATURES, OWN, REWARD, Record, numbers_of
from leapalign.training.tracking import Metrics

Place = tuple[int, int]  # (index of the prompt in the set, index of the image of that prompt)
DRIFT_STEPS = 8  # most sampling steps at which the drift is measured


@torch.no_grad()
def evaluate(engine: Engine) -> Metrics:
    """Return the numbers of an evaluation (`numbers.numbers_of`). Every rank must call it; each draws its part."""
    run, prompts = engine.run, batches.evaluation_set(engine.run, engine.prompts)
    first = [(i, 0) for i in range(len(prompts))]
    several = range(min(run.monitors.diversity_prompts, len(prompts)))
    more = [(i, n) for n in range(1, run.monitors.images_per_prompt) for i in several]
    with engine.ema.applied():
        records = [*_records(engine, prompts, first), *_records(engine, prompts, more)]
    return numbers_of(engine, records, len(several))


def _records(engine: Engine, prompts: Sequence[Prompt], places: Sequence[Place]) -> list[Record]:
    """Draw these images; return one record a micro-batch, of all ranks, in the order of the set."""
    mine = list(_of_rank(engine, prompts, places))
    return [record for round in zip(*engine.world.gather(mine)) for record in round]


def _of_rank(engine: Engine, prompts: Sequence[Prompt], places: Sequence[Place]) -> Iterator[Record]:
    """Yield this rank's records; empty ones where its share is over, because sharded ranks must all run forwards."""
    size, world = engine.run.micro_batch_size, engine.world
    most = engine.run.monitors.drift_samples if places[:1] == [(0, 0)] else 0
    for begin in range(0, len(places), world.size * size):
        start = begin + world.rank * size
        rows = places[start : start + size]
        made = rows or places[:1]  # no rows left: an unused forward
        if engine.rewards_in_step:
            made = [places[min(row, len(places) - 1)] for row in range(start, start + size)]
        drifting = max(0, min(len(rows), most - start))
        record = _record(engine, [prompts[i] for i, _ in made], made, max(1, drifting) if begin < most else 0)
        counts = {name: drifting if name == DRIFT else len(rows) for name in record}
        yield {name: values[: counts[name]].cpu() for name, values in record.items()}


def _record(engine: Engine, prompts: list[Prompt], places: Sequence[Place], drifting: int) -> Record:
    """Draw images and measure them: name -> values [B, ...]. Images beyond a prompt's first are not scored.

    `drifting`: number of first samples whose drift is measured.
    """
    run, texts = engine.run, [prompt.text for prompt in prompts]
    velocity = _Recording(engine.velocity(texts), _drift_calls(run.num_sampling_steps), drifting)
    with engine.rollout():
        x_0 = rollout(velocity, _noise(engine, places), engine.sigmas)
        record = {DRIFT: _drift(engine, velocity, texts[:drifting])} if drifting else {}
    images = engine.images(x_0)
    if places[0][1] == 0:
        record |= {REWARD + name: reward(images, texts) for name, reward in engine.rewards.items()}
        record |= {HELD_OUT + name: reward(images, texts).float() for name, reward in engine.held_out.items()}
    if engine.features:
        record[FEATURES] = engine.features(images)
    if run.monitors.image_statistics:
        record |= {IMAGE + name: values for name, values in image_statistics(images).items()}
    if engine.own_monitor:
        record[OWN] = engine.own_monitor.measure(images, prompts)
    return record


def _noise(engine: Engine, places: Sequence[Place]) -> Tensor:
    """Draw x_T [B, ...]; image n of prompt i is a function of (evaluation_seed, n, i)."""
    seed, purpose = engine.run.evaluation_seed, "fixed set noise"
    generators = [batches.noise_generators(seed, n, [i], purpose)[0] for i, n in places]
    return engine.model.noise(generators).to(engine.sigmas.device)


class _Recording:
    """A velocity that keeps its arguments and values for the first `count` samples at the chosen calls."""

    def __init__(self, velocity: Velocity, calls: Sequence[int], count: int) -> None:
        self.velocity, self.calls, self.count = velocity, calls, count
        self.made = 0  # calls
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        v = self.velocity(x, sigma)
        if self.count and self.made in self.calls:
            self.kept.append((x[: self.count], sigma, v[: self.count]))
        self.made += 1
        return v


def _drift_calls(num_steps: int) -> list[int]:
    return spread(range(num_steps), DRIFT_STEPS)


def _drift(engine: Engine, velocity: _Recording, texts: list[str]) -> Tensor:
    """Mean |v - v_base| at the kept states, over the latent's elements: [B, S], noisiest first."""
    assert engine.base
    base = engine.velocity(texts)
    with engine.base():
        found = [(v - base(x, sigma)).abs().flatten(1).mean(1) for x, sigma, v in velocity.kept]
    return torch.stack(found, dim=1)

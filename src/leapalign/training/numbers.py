"""Numbers of an evaluation, from the records of its images (fixed_set.py).

| metric                                | number                                                                     |
|---------------------------------------|----------------------------------------------------------------------------|
| `evaluation_reward`                   | mean r(x_0); several rewards: their sum, and `evaluation_reward/NAME`      |
| `evaluation_fraction_above_threshold` | share of images above every reward's threshold                             |
| `held_out/NAME`                       | mean of a held-out reward over the images that it gives a number           |
| `diversity/FEATURES`                  | mean distance of two images of one prompt (leapalign.evaluation.diversity) |
| `image/NAME`                          | mean of an image statistic (leapalign.evaluation.image_statistics)         |
| `open_color_entropy`, ...             | the prompts' own (leapalign.prompts.base.MonitoredPrompts)                 |
| `drift`, `drift/SIGMA`                | mean |v - v_base| over samples and elements: mean over steps, and at each  |
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.evaluation.diversity import mean_pairwise_distance
from leapalign.evaluation.image_statistics import DEFINITIONS
from leapalign.prompts.base import spread
from leapalign.run import Run
from leapalign.training.engine import Engine
from leapalign.training.monitors import ABOVE, DIVERSITY, DRIFT, HELD_OUT, IMAGE
from leapalign.training.tracking import Metrics

Record = dict[str, Tensor]  # name -> values [b, ...] of a micro-batch's images, on the CPU
REWARD, FEATURES, OWN = "evaluation_reward/", "features", "own"  # names in a record; others are those of metrics


def numbers_of(engine: Engine, records: list[Record], diverse: int) -> Metrics:
    """Return the metrics of an evaluation. `diverse`: number of prompts of which several images were drawn."""
    run = engine.run
    found = _rewards(engine, records)
    found |= {HELD_OUT + name: _mean(_joined(records, HELD_OUT + name)) for name in engine.held_out}
    if engine.features:
        features = _several(run, _joined(records, FEATURES), diverse)
        found[DIVERSITY + engine.features.name] = float(mean_pairwise_distance(engine.features, features).mean())
    if run.monitors.image_statistics:
        found |= {IMAGE + name: _mean(_joined(records, IMAGE + name)) for name in DEFINITIONS}
    if engine.own_monitor:
        found |= engine.own_monitor.summary(_joined(records, OWN))
    if run.monitors.drift_samples:
        found |= _drift(engine, _joined(records, DRIFT)[: run.monitors.drift_samples])
    return found


def _rewards(engine: Engine, records: list[Record]) -> Metrics:
    """Return mean rewards and the share above the thresholds; sums in float64 over micro-batches."""
    scored = [record for record in records if REWARD + next(iter(engine.rewards)) in record]
    count = sum(len(record[REWARD + next(iter(engine.rewards))]) for record in scored)
    sums = {name: sum(record[REWARD + name].sum().double() for record in scored) for name in engine.rewards}
    means = {name: float(total) / count for name, total in sums.items()}
    above = torch.stack([_joined(records, REWARD + name) >= term.threshold for name, term in engine.terms.items()])
    parts = {REWARD + name: mean for name, mean in means.items()} if len(means) > 1 else {}
    share = float(above.all(0).double().mean())
    return {"evaluation_reward": sum(means.values())} | parts | {ABOVE: share}


def _joined(records: list[Record], name: str) -> Tensor:
    """Join the values of all images that have them: [N, ...]."""
    return torch.cat([record[name] for record in records if name in record])


def _mean(values: Tensor) -> float:
    """Mean over images that have a number."""
    return float(values.double().nanmean())


def _several(run: Run, features: Tensor, diverse: int) -> Tensor:
    """Group features [N, D], first images first and then image by image, by prompt: [diverse, images, D]."""
    size = run.evaluation_size
    others = features[size:].unflatten(0, (run.monitors.images_per_prompt - 1, diverse))
    return torch.cat([features[None, :diverse], others]).transpose(0, 1)


def _drift(engine: Engine, drift: Tensor) -> Metrics:
    """Name the drift [n, S] by sigma."""
    sigmas = spread(engine.sigmas.flip(0)[:-1].tolist(), drift.shape[1])
    means = drift.double().mean(0).tolist()
    return {DRIFT: sum(means) / len(means)} | {f"{DRIFT}/{s:.3f}": mean for s, mean in zip(sigmas, means)}

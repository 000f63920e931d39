"""Measure the quality of the embedded folders for their model cards, on the float16 files that ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from leapalign.evaluation.evaluate import evaluate
from leapalign.evaluation.sampling import Sampling
from leapalign.evaluation.statistics import report
from leapalign.models.sd3 import SD3
from leapalign.prompts import ShapeWorldPrompts
from leapalign.rewards.clip import PickScore
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import render
from leapalign.studies.shapeworld_build.text import T5_LENGTH

Falsifier = Callable[[c.Metadata], list[c.Metadata]]


def swapped_relation(caption: c.Metadata) -> list[c.Metadata]:
    """A left of B -> B left of A, and A right of B."""
    (b, a), relation = [item["class"] for item in caption["include"]], caption["include"][1]["position"][0]
    return [c.positioned(b, relation, a), c.positioned(a, c.OPPOSITE[relation], b)]


def swapped_colors(caption: c.Metadata) -> list[c.Metadata]:
    (a, b), (d, e) = ([item[key] for item in caption["include"]] for key in ("class", "color"))
    return [c.bound(a, e, b, d)]


def count_off_by_one(caption: c.Metadata) -> list[c.Metadata]:
    shape, n = caption["include"][0]["class"], caption["include"][0]["count"]
    return [c.counted(shape, m) for m in (n - 1, n + 1) if m in c.NUMBERS]


FALSIFIERS: dict[str, tuple[str, Falsifier]] = {  # kind of falsehood -> (task, caption -> false captions)
    "swapped relation": ("position", swapped_relation),
    "swapped colors": ("color_attr", swapped_colors),
    "count ± 1": ("counting", count_off_by_one),
    "other near miss, single object": ("single_object", c.near_misses),
    "other near miss, two objects": ("two_object", c.near_misses),
    "other near miss, colors": ("colors", c.near_misses),
    "other near miss, color attribution": ("color_attr", c.near_misses),
    "other near miss, position": ("position", c.near_misses),
}


@torch.no_grad()
def reward_accuracy(path: str, num: int = 500, seed: int = 1000) -> dict[str, Any]:
    """Fraction of (image, false caption) pairs in which the true caption scores higher, for each kind of falsehood.

    `num` rendered scenes a kind, of test combinations (for single objects there are no others).
    """
    reward = PickScore(path=path).load("cpu", "float32")
    result, true_cosines = {}, []
    for kind, (task, falsify) in FALSIFIERS.items():
        rng = np.random.default_rng([seed, c.TASKS.index(task)])
        captions = [c.draw(c.split(task)[1], rng) for _ in range(num)]
        images = torch.from_numpy(render([c.scene_of(caption, rng) for caption in captions]))
        rows = [(i, false["prompt"]) for i, caption in enumerate(captions) for false in falsify(caption)]
        right = reward(images, [caption["prompt"] for caption in captions])
        wrong = reward(images[[i for i, _ in rows]], [prompt for _, prompt in rows])
        result[kind] = {"accuracy": (right[[i for i, _ in rows]] > wrong).float().mean().item(), "pairs": len(rows)}
        true_cosines.append(right)
    return {"accuracy": result, "mean_cosine_of_true_captions": torch.cat(true_cosines).mean().item()}


def guidance_sweep(
    path: str, scales: tuple[float, ...], per_task: int, num_steps: int, seed: int = 7
) -> dict[str, Any]:
    """GenEval's six tasks for each guidance scale, same prompts and noise."""
    prompts = ShapeWorldPrompts(split="test", num=per_task).load()
    result = {}
    for scale in scales:
        model = SD3(
            path=path, height=32, width=32, guidance_scale=scale, max_sequence_length=T5_LENGTH, decode_chunk=0
        ).load("cpu", "float32")
        sampling = Sampling(num_steps=num_steps, batch_size=100, seed=seed)
        result[str(scale)] = report(evaluate(model, prompts, sampling=sampling, rewards={}, detector=detect))["geneval"]
    return result

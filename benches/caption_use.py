"""How much a ShapeWorld generator makes of what a caption asks: relations and whose colour is whose, JSON on stdout.

    python benches/caption_use.py --generator PIPELINE ...

Two captions that differ in one relation (or in whose colour is whose) are given at the same noisy latents. The
difference of the two predicted images, projected on the difference of the two captions' mean true images, is 0 for a
model that does not read the relation and 1 for one that draws it in every image. Where it is 0 no reward's gradient
can make the model follow the relation, since no weight leads from the words to the place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from shared import facts
from torch import Tensor

from leapalign.models.sd3 import SD3
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.world import render

SHAPE_PAIRS = (("circle", "triangle"), ("square", "cross"), ("ring", "diamond"), ("circle", "square"))
COLOR_PAIRS = (("red", "blue"), ("green", "yellow"), ("black", "red"), ("blue", "yellow"))
QUESTIONS = {
    "position": [
        (c.positioned(a, one, b), c.positioned(a, other, b))
        for a, b in SHAPE_PAIRS
        for one, other in (("left of", "right of"), ("above", "below"))
    ],
    "color_attr": [(c.bound(a, x, b, y), c.bound(a, y, b, x)) for a, b in SHAPE_PAIRS[:2] for x, y in COLOR_PAIRS],
    "single_object": [(c.single(a), c.single(b)) for a, b in SHAPE_PAIRS],
}


@dataclass(frozen=True, kw_only=True)
class CaptionUse:
    """Share of a caption's difference that the generator's prediction shows."""

    generator: tuple[str, ...] = ("embedded:generator",)
    sigmas: tuple[float, ...] = (1.0, 0.9, 0.8)
    scenes: int = 200
    """True scenes a caption, for the mean image."""
    noises: int = 64
    """Noisy latents a pair of captions."""


@torch.no_grad()
def main(bench: CaptionUse) -> dict[str, Any]:
    """generator -> question -> sigma -> share."""
    answers = {}
    for path in bench.generator:
        model = SD3(path=path, height=32, width=32, guidance_scale=1.0, max_sequence_length=5, decode_chunk=0)
        loaded = model.load("cpu", "float32")
        answers[path] = {name: shares(bench, loaded, pairs) for name, pairs in QUESTIONS.items()}
    return {"share": answers} | facts(bench)


def shares(bench: CaptionUse, model: Any, pairs: list[tuple[c.Metadata, c.Metadata]]) -> dict[str, float]:
    """sigma -> share, over all pairs together."""
    shown, asked = dict.fromkeys(bench.sigmas, 0.0), 0.0
    rng = np.random.default_rng(0)
    for pair in pairs:
        truth = [latents(model, caption, bench.scenes, rng) for caption in pair]
        ideal = truth[0].mean(0) - truth[1].mean(0)
        asked += float(ideal.square().sum())
        clean = torch.cat(truth)[torch.from_numpy(rng.permutation(2 * bench.scenes)[: bench.noises])]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        for sigma in bench.sigmas:
            x = (1 - sigma) * clean + sigma * noise
            v = [model.velocity(model.encode([each["prompt"]] * len(x)))(x, torch.tensor(sigma)) for each in pair]
            shown[sigma] += float((sigma * (v[1] - v[0]).mean(0) * ideal).sum())
    return {str(sigma): round(value / asked, 4) for sigma, value in shown.items()}


def latents(model: Any, caption: c.Metadata, num: int, rng: np.random.Generator) -> Tensor:
    """[num, 8, 8, 8] of scenes of which the caption is true."""
    images = torch.from_numpy(render([c.scene_of(caption, rng) for _ in range(num)]))
    decoder = model.decoder
    return (decoder.vae.encode(2 * images - 1).latent_dist.mode() - decoder.shift) * decoder.scale


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(CaptionUse)), indent=2))

"""A figure of variety: images of a few prompts whose colours are open, from the base and from finished ShapeWorld runs.

    python benches/variety_figure.py --runs runs/free runs/anchored --labels "no cure" anchored --out variety.png

The prompts are the first validation prompts of single objects, counting and position, and the noises are the same for
every model; nothing is selected by its look. Prints the models and prompts as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import tyro
from shared import facts

from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.recipes import shapeworld_leapalign

TASKS = ("single_object", "counting", "position")


@dataclass(frozen=True, kw_only=True)
class Variety:
    """One panel a model, one row a prompt, one column a noise."""

    runs: tuple[Path, ...]
    labels: tuple[str, ...]
    out: Path = Path("variety.png")
    images: int = 6
    """Noises a prompt."""
    prompts_per_task: int = 2


def main(bench: Variety) -> dict[str, Any]:
    config = shapeworld_leapalign().model
    models = {"base": config} | {
        label: replace(config, path=str(run / "pipeline")) for label, run in zip(bench.labels, bench.runs, strict=True)
    }
    prompts = chosen(bench.prompts_per_task)
    sampling = Sampling(num_steps=8, images_per_prompt=bench.images, seed=0)
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 0.75 * len(prompts) + 0.5))
    for axis, (label, model) in zip(axes, models.items()):
        images = draw_images(model.load("cpu", "float32"), [prompt.text for prompt in prompts], sampling)
        axis.imshow(sheet(images, bench.images).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(label)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(bench.out, dpi=110)
    return {"prompts": [prompt.text for prompt in prompts], "models": [m.path for m in models.values()]} | facts(bench)


def chosen(count: int) -> list[Prompt]:
    """The first `count` validation prompts of each of TASKS."""
    found = ShapeWorldPrompts(split="validation", num=count).load()
    return [prompt for prompt in found if prompt.metadata and prompt.metadata["tag"] in TASKS]


def sheet(images: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, 3, H, W], in rows of `columns`, with a white line between them -> [3, H', W']."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    rows = padded.unflatten(0, (-1, columns))
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Variety)), indent=2))

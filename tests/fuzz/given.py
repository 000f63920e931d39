"""What a user may have: tiny folders of every family and of most rewards, runs, prompts, pictures, a recipe file."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny_checkpoints
import tiny_pipelines
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.methods.draft import DRaFT
from leapalign.methods.leapalign import LeapAlign
from leapalign.models.flux import Flux
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.qwen_image import QwenImage
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage
from leapalign.prompts import PromptFile, ShapeWorldPrompts
from leapalign.prompts.geneval import GenEvalPrompts
from leapalign.prompts.sets import DrawBench
from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.clip import PickScore
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.run import RewardTerm, Run
from leapalign.tuning.lora import LoRA
from tiny_clip import write_tiny_clip
from tiny_qwen import write_tiny_hpsv3

PIPELINES = ("sd3", "flux", "flux2", "qwen-image", "z-image")
REWARDS = ("clip", "hpsv2", "imagereward", "hpsv3", "aesthetic")
RECIPE = Path(__file__).parents[1] / "training" / "tiny_recipe.py"


def write(folder: Path) -> None:
    """All of it; paths in run.json files are relative to the working folder."""
    for name in PIPELINES:
        tiny_pipelines.save(getattr(tiny_pipelines, f"{name.replace('-', '_')}_pipeline")(), folder / name)
    write_tiny_clip(folder / "clip")
    tiny_checkpoints.write_tiny_hpsv2(folder / "hpsv2")
    tiny_checkpoints.write_tiny_imagereward(folder / "imagereward")
    tiny_checkpoints.write_tiny_aesthetic(folder / "aesthetic")
    (folder / "hpsv3").mkdir()
    write_tiny_hpsv3(folder / "hpsv3")
    _write_texts(folder)
    _write_pictures(folder)
    shutil.copy(RECIPE, folder / "mine.py")
    for name, run in runs().items():
        (folder / f"{name}.json").write_text(dumps(run))
    _train(folder)


def runs() -> dict[str, Run]:
    """A run of one step for each family, each with another reward."""
    size: dict[str, Any] = {"height": 16, "width": 16}
    first = Run(
        name="given",
        model=SD3(path="sd3", max_sequence_length=5, **size),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=PickScore(path="clip"), threshold=1.0),),
        prompts=PromptFile(path="prompts.txt"),
        out="new",
        steps=1,
        batch_size=2,
        num_sampling_steps=2,
        evaluate_every=0,
        self_checks=False,
        device="cpu",
    )

    def other(model: Any, reward: Any, **changes: Any) -> Run:
        return replace(first, model=model, rewards=(RewardTerm(reward=reward, threshold=9.0),), **changes)

    return {
        "sd3": first,
        "flux": other(
            Flux(path="flux", max_sequence_length=5, **size),
            HPSv2(path="hpsv2", processor="hpsv2"),
            prompts=GenEvalPrompts(num=9),
        ),
        "flux2": other(
            Flux2Klein(path="flux2", text_layers=(1, 2, 4), max_sequence_length=64, **size),
            HPSv3(path="hpsv3", processor="hpsv3"),
            method=DRaFT(),
        ),
        "qwen-image": other(
            QwenImage(path="qwen-image", max_sequence_length=64, **size),
            ImageReward(path="imagereward", processor="imagereward"),
            prompts=ShapeWorldPrompts(num=9),
        ),
        "z-image": other(
            ZImage(path="z-image", max_sequence_length=64, **size),
            Aesthetic(path="clip", head="aesthetic"),
            prompts=DrawBench(path="drawbench.json"),
            tuning=LoRA(rank=2),
        ),
    }


def _write_texts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "prompts.csv").write_text('id,prompt\n1,a red circle\n2,"two green star"\n')
    line = '{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}\n'
    color = (
        '{"tag": "colors", "include": [{"class": "square", "count": 1, "color": "red"}], "prompt": "a red square"}\n'
    )
    (folder / "prompts.jsonl").write_text(line + color)
    (folder / "drawbench.json").write_text('["a red circle", {"prompt": "two green star"}]')
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")


def _write_pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
    for name in ("picture.png", "picture.jpg", "picture.webp", "picture.gif", "picture.bmp", "picture.tiff"):
        Image.fromarray(pixels).save(folder / name)


def _train(folder: Path) -> None:
    """`run`, with two checkpoints, and `lora`."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        for words in (
            ["train", "sd3.json", "--out", "run", "--steps", "2", "--checkpoint-every", "1"],
            ["train", "z-image.json", "--out", "lora"],
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                status = main(words)
            if status:
                raise RuntimeError(f"{words} failed")
    finally:
        os.chdir(here)

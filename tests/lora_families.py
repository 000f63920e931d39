"""What the tests of adapters run over: a family is a tiny pipeline and our configuration of it; add yours here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_pipelines as tiny
from leapalign.flow.rollout import rollout
from leapalign.models.flux import Flux
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.qwen_image import QwenImage
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage
from leapalign.tuning.files import FILE

PROMPTS = ["a red circle", "two blue star left of the green square above"]
NUM_STEPS = 3
SIZE: dict[str, Any] = {"height": 16, "width": 24, "max_sequence_length": 5}


@dataclass(frozen=True)
class Family:
    build: Callable[[], Any]  # a tiny diffusers pipeline
    config: Callable[[str], Any]  # folder -> our configuration
    call: dict[str, Any]  # what the pipeline's own call takes for the same picture


FAMILIES = {
    "sd3": Family(
        tiny.sd3_pipeline,
        lambda folder: SD3(path=folder, guidance_scale=3.5, **SIZE),
        {"guidance_scale": 3.5, "negative_prompt": ["", ""], **SIZE},
    ),
    "flux": Family(
        tiny.flux_pipeline,
        lambda folder: Flux(path=folder, guidance_scale=3.5, **SIZE),
        {"guidance_scale": 3.5, **SIZE},
    ),
    "flux2": Family(
        lambda: tiny.flux2_pipeline(distilled=True),
        lambda folder: Flux2Klein(path=folder, text_layers=(1, 2, 4), **SIZE | {"max_sequence_length": 24}),
        {"text_encoder_out_layers": (1, 2, 4), **SIZE, "max_sequence_length": 24},
    ),
    "qwen-image": Family(
        tiny.qwen_image_pipeline,
        lambda folder: QwenImage(path=folder, guidance_scale=3.5, **SIZE | {"max_sequence_length": 30}),
        {"true_cfg_scale": 3.5, "negative_prompt": [" ", " "], **SIZE, "max_sequence_length": 30},
    ),
    "z-image": Family(
        tiny.z_image_pipeline,
        lambda folder: ZImage(path=folder, guidance_scale=2.5, **SIZE | {"max_sequence_length": 40}),
        {"guidance_scale": 2.5, "negative_prompt": ["", ""], **SIZE, "max_sequence_length": 40},
    ),
}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@torch.no_grad()
def our_images(model: Any) -> Tensor:
    """[2, 3, H, W] by our sampler."""
    return model.decode(
        rollout(model.velocity(model.encode(PROMPTS)), model.noise(generators()), model.sigmas(NUM_STEPS))
    )


def pipeline_images(family: Family, folder: str | Path, lora: str | Path = "", weight: float = 1.0) -> Tensor:
    """[2, 3, H, W] by the pipeline's own call, with a LoRA file loaded by its own loader at its own `weight`."""
    pipeline = type(family.build()).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora), weight_name=FILE, adapter_name="run")  # named: 0.39 asks for it offline
        pipeline.set_adapters("run", weight)
    call = {name: list(value) if isinstance(value, list) else value for name, value in family.call.items()}
    return pipeline(  # copies of the lists: ZImagePipeline writes its chat format into the caller's
        prompt=list(PROMPTS), num_inference_steps=NUM_STEPS, generator=generators(), output_type="pt", **call
    ).images


@torch.no_grad()
def disturb(policy: Any, size: float = 0.2, seed: int = 5) -> None:
    """Give every B values, as training does: an untrained adapter would hide every error behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if ".lora_B." in name:
            p.copy_(size * torch.randn(p.shape, generator=generator))

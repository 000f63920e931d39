"""diffusers' own pipeline around a loaded policy: what our sampler must agree with, from the same text and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.models.base import Conditioning

if TYPE_CHECKING:
    from leapalign.models.pipeline import PipelineModel


@torch.no_grad()
def pipeline_latents(model: Any, config: Any, text: Conditioning, noise: Tensor, num_steps: int) -> Tensor | None:
    """The latents [B, C, h, w] that diffusers makes of `noise`; None for a family that is not known here.

    `config`: the model's configuration (guidance). No part but the scheduler is loaded a second time. As in our own
    sampler, the policy alone computes in the model's dtype; text, latents and the scheduler's sums are float32.
    """
    from leapalign.models.folder import load_part

    run = FAMILIES.get(getattr(config, "name", ""))
    folder = getattr(model, "folder", None)
    if run is None or folder is None:
        return None
    prompts = text.prompts.map(Tensor.float)
    shared = {
        "prompt_embeds": prompts.tokens,
        "pooled_prompt_embeds": prompts.pooled,
        "num_inference_steps": num_steps,
        "output_type": "latent",
        "return_dict": False,
        "height": config.height,
        "width": config.width,
    }
    if text.negative:
        negative = text.negative.map(Tensor.float).expand(len(noise))
        shared |= {"negative_prompt_embeds": negative.tokens, "negative_pooled_prompt_embeds": negative.pooled}
    widened = model.policy.register_forward_hook(lambda _, inputs, output: tuple(v.float() for v in output))
    try:
        with torch.autocast(noise.device.type, dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            return run(model, config, load_part(folder, "scheduler"), noise, shared)
    finally:
        widened.remove()


def _sd3(model: PipelineModel, config: Any, scheduler: Any, noise: Tensor, shared: dict[str, Any]) -> Tensor:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    parts = {"transformer": model.policy, "scheduler": scheduler, "vae": model.decoder.vae} | _no_text(3)
    pipeline: Any = StableDiffusion3Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(latents=noise, guidance_scale=config.guidance_scale, **shared)[0]


def _flux(model: PipelineModel, config: Any, scheduler: Any, noise: Tensor, shared: dict[str, Any]) -> Tensor:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    pipeline: Any = FluxPipeline(transformer=model.policy, scheduler=scheduler, vae=model.decoder.vae, **_no_text(2))  # pyright: ignore
    pipeline.set_progress_bar_config(disable=True)
    packed = FluxPipeline._pack_latents(noise, *noise.shape)
    guidance = {"guidance_scale": config.guidance_scale, "true_cfg_scale": config.true_cfg_scale}
    latents = pipeline(latents=packed, **guidance, **shared)[0]
    return FluxPipeline._unpack_latents(latents, *noise.shape[2:], vae_scale_factor=1)


def _no_text(count: int) -> dict[str, Any]:
    names = [f"{part}{suffix}" for suffix in ("", "_2", "_3")[:count] for part in ("text_encoder", "tokenizer")]
    return dict.fromkeys(names)


FAMILIES: dict[str, Callable[..., Tensor]] = {"sd3": _sd3, "flux": _flux}

"""diffusers' own pipeline as the reference for our sampler, around a loaded policy or opened from the folder."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from leapalign.models.base import Conditioning, Family, ModelConfig, Text


@torch.no_grad()
def pipeline_latents(
    model: Any, config: ModelConfig, text: Conditioning, noise: Tensor, num_steps: int
) -> Tensor | None:
    """Sample latents [B, C, h, w] from `noise` with diffusers; None for a model that is not a diffusers pipeline.

    `config`: the model's settings (guidance). Only the scheduler is loaded a second time. As in our sampler, only the
    policy computes in the model's dtype; prompt embeds, latents and the scheduler's sums are float32.
    """
    if not isinstance(config, Family):
        return None
    pipeline = _around(model, config.pipeline)
    settings = config.call_arguments(num_steps) | _embeddings(text, len(noise), pipeline)
    settings.pop("negative_prompt", None)  # passed as embeds, if it is used
    packed = pipeline._pack_latents(noise, *noise.shape) if _packs(pipeline) else noise
    with torch.autocast(noise.device.type, dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        latents = pipeline(latents=packed, num_inference_steps=num_steps, output_type="latent", **settings).images
    return as_ours(latents, pipeline, model)


def open_pipeline(config: Family, folder: Path) -> Any:
    """Load the whole pipeline in float32, with its own text encoders and weights."""
    import diffusers

    from leapalign.storage.pipeline_folder import INDEX, read_json

    index = read_json(folder / INDEX)
    absent = {
        name: None
        for name, component in index.items()
        if isinstance(component, list) and len(component) == 2 and not component[1]
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the argument's name, which older versions need
        pipeline = getattr(diffusers, config.pipeline).from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, **absent
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_ours(latents: Tensor, pipeline: Any, model: Any) -> Tensor:
    """Convert the pipeline's latents to our layout, [B, C, h, w]."""
    shape = (len(latents), *model.latent_shape)
    if _packs(pipeline):  # tokens of 2 x 2
        return pipeline._unpack_latents(latents, *shape[2:], vae_scale_factor=1).reshape(shape)
    if hasattr(pipeline, "_patchify_latents"):  # FLUX.2: as its VAE takes them
        return (pipeline._patchify_latents(latents) - model.decoder.shift) * model.decoder.scale
    return latents


class InFloat32:
    """Wrap the policy with float32 inputs and outputs, so that the pipeline does not round latents to its dtype."""

    dtype = torch.float32

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, Tensor.float, self._policy(*args, **kwargs))


def _around(model: Any, kind: str) -> Any:
    """Build the pipeline from loaded components, without text encoders."""
    import diffusers

    from leapalign.storage.components import load_component

    pipeline_class = getattr(diffusers, kind)
    takes = inspect.signature(pipeline_class.__init__).parameters
    components: dict[str, Any] = {name: None for name in takes if name.startswith(("text_encoder", "tokenizer"))}
    components |= {
        "transformer": model.policy,
        "vae": model.decoder.vae,
        "scheduler": load_component(model.folder, "scheduler"),
    }
    if "is_distilled" in takes:
        components["is_distilled"] = not model.guidance.active
    pipeline = pipeline_class(**components)
    pipeline.transformer = InFloat32(model.policy)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _packs(pipeline: Any) -> bool:
    return hasattr(pipeline, "_unpack_latents")


def _embeddings(text: Conditioning, rows: int, pipeline: Any) -> dict[str, Any]:
    """Return the prompt embeds as keyword arguments of the pipeline's call."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    as_list = not takes.keys() & {"prompt_embeds_mask", "prompt_attention_mask"}
    found = _named("", text.prompts, as_list)
    if text.negative:
        found |= _named("negative_", text.negative.expand(rows), as_list)
    return {name: value for name, value in found.items() if name in takes and value is not None}


def _named(prefix: str, text: Text, as_list: bool) -> dict[str, Any]:
    """Name embeds with `prefix`. `as_list`: masked embeds become a list without padding, as Z-Image takes them."""
    tokens: Any = text.tokens.float()
    if as_list and text.mask is not None:
        tokens = [row[counts] for row, counts in zip(tokens, text.mask)]
    pooled = text.pooled.float() if text.pooled is not None else None
    # some pipelines require a mask, under this name, where all tokens count too (AuraFlow)
    required = torch.ones_like(text.tokens[..., 0], dtype=torch.bool) if text.mask is None else text.mask
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask", "prompt_attention_mask")
    return {prefix + name: value for name, value in zip(names, (tokens, pooled, text.mask, required))}

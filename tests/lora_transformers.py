"""Transformers of the built-in families: shapes without weights, on the meta device; and their layers for adapters."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from leapalign.models import FAMILIES
from leapalign.tuning.targets import find_targets

RANK = 2
TARGETS = {  # class of the transformer -> its family's default
    next(iter(family.published.values())).components["transformer"][0].partition(".")[2]: family.lora_targets
    for family in FAMILIES
}


def transformers() -> dict[str, Any]:
    """class -> two blocks of each kind; FLUX.1 in its true width, which diffusers' converter has built in."""
    import diffusers

    with init_empty_weights():
        return {
            "SD3Transformer2DModel": diffusers.SD3Transformer2DModel(
                sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
                pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
            ),
            "FluxTransformer2DModel": diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2),
            "Flux2Transformer2DModel": diffusers.Flux2Transformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4),
            ),
            "QwenImageTransformer2DModel": diffusers.QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
            ),
            "ZImageTransformer2DModel": diffusers.ZImageTransformer2DModel(
                in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                axes_dims=[4, 6, 6], axes_lens=[32, 32, 32],
            ),
        }  # fmt: skip


def random_state(plain: Any, targets: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """An adapter's state with values, for the layers that `targets` mean."""
    generator, state = torch.Generator().manual_seed(1), {}
    for name in find_targets(plain, targets, TARGETS[type(plain).__name__]):
        layer = plain.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=generator)
    return state

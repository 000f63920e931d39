"""LoRA files for ComfyUI: the layout of kohya's scripts over the module names of the models' original repositories.

`lora_unet_<original name, dots as underscores>.lora_down.weight` [r, in], `.lora_up.weight` [out, r], `.alpha` (= r).
ComfyUI builds these names from the checkpoint that it has loaded. Where diffusers splits one original layer into parts
(q, k, v, and FLUX's single blocks' MLP), the parts' adapters stand in one of rank (parts x r), block-diagonal in `up`:
exactly the same product, and diffusers' converters take it apart again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leapalign.codec import suggestion
from leapalign.errors import UserError

FILE = "comfyui_lora.safetensors"

_FLUX_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
}
_Z_IMAGE_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "feed_forward.w1": ("feed_forward.w1",),
    "feed_forward.w2": ("feed_forward.w2",),
    "feed_forward.w3": ("feed_forward.w3",),
}
_QWEN_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2", "txt_mod.1"),
)

# class -> diffusers' list of blocks -> (the original's, {original layer: diffusers' parts of it, in order})
LAYOUTS: dict[str, dict[str, tuple[str, dict[str, tuple[str, ...]]]]] = {
    "SD3Transformer2DModel": {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        )
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            "double_blocks",
            _FLUX_ATTENTION
            | {
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "txt_mod.lin": ("norm1_context.linear",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
            },
        ),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": (
            "double_blocks",
            _FLUX_ATTENTION
            | {
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks": ("transformer_blocks", {layer: (layer,) for layer in _QWEN_LAYERS}),
    },
    "ZImageTransformer2DModel": {
        blocks: (blocks, _Z_IMAGE_BLOCK) for blocks in ("layers", "noise_refiner", "context_refiner")
    },
}


def to_comfyui(state: dict[str, Tensor], plain: Any) -> dict[str, Tensor]:
    """`state` as `adapter_state` has it, `plain` a transformer of its class (on any device, meta too): for sizes.

    UserError where a class or a layer has no name in the table.
    """
    layout = LAYOUTS.get(type(plain).__name__)
    if layout is None:
        raise UserError(f"comfyui: no names for {type(plain).__name__}, only for {', '.join(LAYOUTS)}; use format lora")
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    groups = dict.fromkeys(_group(layer, layout) for layer in layers)  # each original layer once, in order
    converted = {}
    for original, parts in groups:
        down, up = _joined([_factors(state, part, plain, parts, layers) for part in parts])
        name = "lora_unet_" + original.replace(".", "_")
        converted[f"{name}.lora_down.weight"] = down
        converted[f"{name}.lora_up.weight"] = up
        converted[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))  # float32: bfloat16 cannot count to 300
    return converted


def _group(layer: str, layout: dict[str, tuple[str, dict[str, tuple[str, ...]]]]) -> tuple[str, tuple[str, ...]]:
    """transformer_blocks.3.attn.to_k -> double_blocks.3.img_attn.qkv, and the full names of all its parts."""
    blocks, _, rest = layer.partition(".")
    number, _, part = rest.partition(".")
    original_blocks, table = layout.get(blocks, ("", {}))
    for original, parts in table.items():
        if part in parts:
            return f"{original_blocks}.{number}.{original}", tuple(f"{blocks}.{number}.{p}" for p in parts)
    known = [part for _, table in layout.values() for parts in table.values() for part in parts]
    raise UserError(f"comfyui: no name for the layer {layer}{suggestion(part, known)}; use format lora")


def _factors(
    state: dict[str, Tensor], part: str, plain: Any, parts: tuple[str, ...], layers: list[str]
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r]; zeros for a part of the original layer that has no adapter."""
    if f"{part}.lora_A.weight" in state:
        return state[f"{part}.lora_A.weight"], state[f"{part}.lora_B.weight"]
    A = state[f"{next(p for p in parts if p in layers)}.lora_A.weight"]
    return torch.zeros_like(A), A.new_zeros(plain.get_submodule(part).out_features, A.shape[0])


def _joined(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[sum r, in] and the block-diagonal [sum out, sum r]: up @ down is every part's B @ A, one below the other."""
    downs, ups = zip(*factors)
    return torch.cat(downs).contiguous(), torch.block_diag(*ups).contiguous()

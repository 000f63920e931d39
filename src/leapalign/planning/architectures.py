"""The numbers that define published pipelines, so that a plan needs no download: facts of their public configurations.

A hub id -> what its folder holds: model_index.json, and each part's configuration. Nothing of the published files is
copied; keys that equal the classes' own defaults are left out. FLUX.1's and SD3's parameter counts are compared with
the published sizes in tests/planning/test_architectures.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A published pipeline without its weights."""

    kind: str  # the class of diffusers
    parts: dict[str, tuple[str, Config]]  # part -> (library.class, configuration)
    gated: bool = False  # its licence must be accepted on its page first
    licence: str = ""
    bytes_per_weight: int = 2  # as published
    index: Config = field(default_factory=dict)  # what else model_index.json says


def flux_transformer(**changes: Any) -> tuple[str, Config]:
    """19 double and 38 single blocks of width 3072."""
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }
    return "diffusers.FluxTransformer2DModel", config | changes


def sd3_transformer(**changes: Any) -> tuple[str, Config]:
    """SD3-M: 24 blocks of width 1536."""
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    return "diffusers.SD3Transformer2DModel", config | changes


def vae(scaling_factor: float, shift_factor: float) -> tuple[str, Config]:
    """16 channels, factor 8, 84 M weights."""
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return "diffusers.AutoencoderKL", config


def clip_l(kind: str) -> tuple[str, Config]:
    """OpenAI's ViT-L/14, its text tower."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return f"transformers.{kind}", _clip(config, projection_dim=768, hidden_act="quick_gelu")


def clip_g() -> tuple[str, Config]:
    """OpenCLIP's ViT-bigG/14, its text tower."""
    config = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return "transformers.CLIPTextModelWithProjection", _clip(config, projection_dim=1280, hidden_act="gelu")


def _clip(config: Config, **more: Any) -> Config:
    words = {"vocab_size": 49408, "max_position_embeddings": 77, "model_type": "clip_text_model"}
    return config | words | more


def t5_xxl() -> tuple[str, Config]:
    """The encoder of T5 v1.1 XXL."""
    config = {
        "model_type": "t5",
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    }
    return "transformers.T5EncoderModel", config


def scheduler(**changes: Any) -> tuple[str, Config]:
    return "diffusers.FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0} | changes


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def flux(transformer: tuple[str, Config], grid: tuple[str, Config], **facts: Any) -> Pipeline:
    parts = {
        "transformer": transformer,
        "vae": vae(0.3611, 0.1159),
        "scheduler": grid,
        "text_encoder": clip_l("CLIPTextModel"),
        "text_encoder_2": t5_xxl(),
        "tokenizer": ("transformers.CLIPTokenizer", {}),
        "tokenizer_2": ("transformers.T5TokenizerFast", {}),
    }
    return Pipeline(kind="FluxPipeline", parts=parts, **facts)


def sd3(transformer: tuple[str, Config], **facts: Any) -> Pipeline:
    parts = {
        "transformer": transformer,
        "vae": vae(1.5305, 0.0609),
        "scheduler": scheduler(),
        "text_encoder": clip_l("CLIPTextModelWithProjection"),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5_xxl(),
        "tokenizer": ("transformers.CLIPTokenizer", {}),
        "tokenizer_2": ("transformers.CLIPTokenizer", {}),
        "tokenizer_3": ("transformers.T5TokenizerFast", {}),
    }
    return Pipeline(kind="StableDiffusion3Pipeline", parts=parts, gated=True, licence=STABILITY, **facts)


BFL = "FLUX.1 [dev] Non-Commercial License"
STABILITY = "Stability AI Community License"
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}

PIPELINES: dict[str, Pipeline] = {
    "black-forest-labs/FLUX.1-dev": flux(flux_transformer(), scheduler(**DYNAMIC), gated=True, licence=BFL),
    "black-forest-labs/FLUX.1-Krea-dev": flux(flux_transformer(), scheduler(**DYNAMIC), gated=True, licence=BFL),
    "black-forest-labs/FLUX.1-schnell": flux(
        flux_transformer(guidance_embeds=False), scheduler(shift=1.0), licence="Apache-2.0"
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3(sd3_transformer()),
    "stabilityai/stable-diffusion-3.5-medium": sd3(
        sd3_transformer(pos_embed_max_size=384, dual_attention_layers=list(range(13)), qk_norm="rms_norm")
    ),
    "stabilityai/stable-diffusion-3.5-large": sd3(sd3_transformer(**SD35_LARGE)),
}

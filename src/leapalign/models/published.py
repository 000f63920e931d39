"""The numbers that define published pipelines, so that a plan needs no download: facts of their public configurations.

A hub id -> what its folder holds: model_index.json, and each part's configuration. Nothing of the published files is
copied; keys that equal the classes' own defaults are left out. FLUX.1's and SD3's parameter counts are compared with
the published sizes in tests/planning/test_architectures.py. Those of FLUX.2 [klein], Qwen-Image and Z-Image are
`unchecked`: only their totals agree with what their names say.
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
    unchecked: bool = False  # the numbers could not be compared with the published files or their sizes
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


def qwen3(*, kind: str, width: int, feed_forward: int, tied: bool) -> tuple[str, Config]:
    """36 layers: Qwen3-4B (width 2560, output and word embedding tied) or 8B (width 4096)."""
    config = {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }
    return f"transformers.{kind}", config


def qwen2_5_vl() -> tuple[str, Config]:
    """Qwen2.5-VL-7B, its eyes included: the whole of it lies in the folder."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    return "transformers.Qwen2_5_VLForConditionalGeneration", config


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


def flux2_klein(*, large: bool, distilled: bool) -> Pipeline:
    """5 double and 20 single blocks of width 3072 (4B), or 8 and 24 of 4096 (9B); three layers of Qwen3 as text."""
    width, feed_forward = (4096, 12288) if large else (2560, 9728)
    sizes = (8, 24, 32) if large else (5, 20, 24)
    transformer = dict(zip(("num_layers", "num_single_layers", "num_attention_heads"), sizes))
    transformer |= {"joint_attention_dim": 3 * width, "guidance_embeds": False}
    return Pipeline(
        kind="Flux2KleinPipeline",
        parts={
            "transformer": ("diffusers.Flux2Transformer2DModel", transformer),
            "vae": ("diffusers.AutoencoderKLFlux2", FLUX2_VAE),
            "scheduler": scheduler(use_dynamic_shifting=True),
            "text_encoder": qwen3(kind="Qwen3ForCausalLM", width=width, feed_forward=feed_forward, tied=not large),
            "tokenizer": ("transformers.Qwen2TokenizerFast", {}),
        },
        gated=large,
        licence="FLUX Non-Commercial License" if large else "Apache-2.0",
        unchecked=True,
        index={"is_distilled": distilled},
    )


def qwen_image() -> Pipeline:
    """60 blocks of width 3072: the classes' own defaults."""
    dynamic = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return Pipeline(
        kind="QwenImagePipeline",
        parts={
            "transformer": ("diffusers.QwenImageTransformer2DModel", {"num_layers": 60}),
            "vae": ("diffusers.AutoencoderKLQwenImage", {"z_dim": 16}),
            "scheduler": scheduler(shift=1.0, use_dynamic_shifting=True, **dynamic),
            "text_encoder": qwen2_5_vl(),
            "tokenizer": ("transformers.Qwen2Tokenizer", {}),
        },
        licence="Apache-2.0",
        unchecked=True,
    )


def z_image(shift: float) -> Pipeline:
    """30 blocks of width 3840, and two that refine each of noise and text: the class's own defaults; FLUX.1's VAE."""
    return Pipeline(
        kind="ZImagePipeline",
        parts={
            "transformer": ("diffusers.ZImageTransformer2DModel", {"n_layers": 30}),
            "vae": vae(0.3611, 0.1159),
            "scheduler": scheduler(shift=shift),
            "text_encoder": qwen3(kind="Qwen3Model", width=2560, feed_forward=9728, tied=True),
            "tokenizer": ("transformers.Qwen2Tokenizer", {}),
        },
        licence="Apache-2.0",
        unchecked=True,
    )


FLUX2_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
}
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
    "black-forest-labs/FLUX.2-klein-4B": flux2_klein(large=False, distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": flux2_klein(large=True, distilled=True),
    "black-forest-labs/FLUX.2-klein-base-4B": flux2_klein(large=False, distilled=False),
    "black-forest-labs/FLUX.2-klein-base-9B": flux2_klein(large=True, distilled=False),
    "Qwen/Qwen-Image": qwen_image(),
    "Tongyi-MAI/Z-Image": z_image(shift=6.0),
    "Tongyi-MAI/Z-Image-Turbo": z_image(shift=3.0),
}

"""Published pipelines without weights, so that a plan needs no download, and components that families share.

Each family's file lists its published pipelines: hub id -> `Published`. Numbers are facts of the public configs; no
published file is copied, and keys with the class's default may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Scores of an untrained model from one table of the paper (arXiv 2604.15311)."""

    where: str  # table, prompts and sampling
    scores: Mapping[str, float]  # reward as in `leapalign list rewards`, and its output or aspect -> mean


HPDV2 = "HPDv2 test, 400 prompts, 4 images each"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published pipeline without its weights, and what was measured on it.

    A folder is recognised as this model if its transformer's config.json has the same value for every key of
    `components["transformer"]`; these are therefore keys that every published config.json has.
    """

    kind: str  # diffusers class
    components: dict[str, tuple[str, Config]]  # component -> (library.class, configuration)
    gated: bool = False  # its licence must first be accepted on its hub page
    licence: str = ""
    unchecked: bool = False  # numbers not compared with the published files or their sizes
    bytes_per_weight: int = 2  # as published
    index: Config = field(default_factory=dict)  # further entries of model_index.json
    figures: tuple[Figures, ...] = ()  # scores of the untrained model


def vae(scaling_factor: float, shift_factor: float) -> tuple[str, Config]:
    """Return an AutoencoderKL with 16 channels, factor 8, 84 M weights."""
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
    """Return the text tower of OpenAI's ViT-L/14."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return f"transformers.{kind}", _clip(config, projection_dim=768, hidden_act="quick_gelu")


def clip_g() -> tuple[str, Config]:
    """Return the text tower of OpenCLIP's ViT-bigG/14."""
    config = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return "transformers.CLIPTextModelWithProjection", _clip(config, projection_dim=1280, hidden_act="gelu")


def _clip(config: Config, **more: Any) -> Config:
    words = {"vocab_size": 49408, "max_position_embeddings": 77, "model_type": "clip_text_model"}
    return config | words | more


def t5_xxl() -> tuple[str, Config]:
    """Return the encoder of T5 v1.1 XXL."""
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
    """Return a Qwen3 of 36 layers: 4B (width 2560, output tied to word embedding) or 8B (width 4096)."""
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


def scheduler(**changes: Any) -> tuple[str, Config]:
    """Return a FlowMatchEulerDiscreteScheduler with shift 3 and the given changes."""
    return "diffusers.FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0} | changes

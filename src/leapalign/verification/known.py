"""The published models by the numbers of their transformers, and what the paper measured on them (arXiv 2604.15311).

Sizes: config.json of the transformers in the repositories named. Schedulers: their scheduler_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The untrained model's row of one table."""

    where: str  # table, prompts and how the pictures are drawn
    scores: Mapping[str, float]  # reward as in `leapalign list rewards`, and its output or aspect -> mean


@dataclass(frozen=True, kw_only=True)
class Known:
    names: tuple[str, ...]  # hub ids with these very numbers
    transformer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    figures: tuple[Figures, ...] = field(default=())


_FLUX = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
}
_SD3 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
_DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_HPDV2 = "HPDv2 test, 400 prompts, 4 pictures each"
_FLUX_TABLE_2 = Figures(
    where=f"Table 2: {_HPDV2}, 720 x 720, 50 steps, guidance 3.5",
    scores={
        "hpsv2": 0.3078,
        "hpsv3": 13.5020,
        "pickscore logit": 22.7902,
        "unified alignment": 3.4514,
        "unified quality": 3.5708,
        "imagereward": 1.0455,
    },
)
_FLUX_GENEVAL = Figures(where="Table 2: GenEval, 553 prompts, 4 pictures each", scores={"geneval": 0.6535})
_FLUX_TABLE_3 = Figures(where="Table 3: MJHQ-30k, a random 500 prompts", scores={"hpsv3": 10.7624})
_SD35_TABLE_4 = Figures(
    where=f"Table 4: {_HPDV2}, 512 x 512, 50 steps",
    scores={
        "hpsv2": 0.2967,
        "hpsv3": 12.2846,
        "pickscore logit": 22.5189,
        "unified alignment": 3.4436,
        "unified quality": 3.5565,
        "imagereward": 1.0614,
    },
)
MODELS = (
    Known(
        names=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"),
        transformer=_FLUX | {"guidance_embeds": True},
        scheduler={"shift": 3.0, "use_dynamic_shifting": True, **_DYNAMIC},
        figures=(_FLUX_TABLE_2, _FLUX_TABLE_3, _FLUX_GENEVAL),
    ),
    Known(
        names=("black-forest-labs/FLUX.1-schnell",),
        transformer=_FLUX | {"guidance_embeds": False},
        scheduler={"shift": 1.0, "use_dynamic_shifting": False},
    ),
    Known(
        names=("stabilityai/stable-diffusion-3.5-medium",),
        transformer=_SD3
        | {"num_layers": 24, "num_attention_heads": 24, "qk_norm": "rms_norm", "pos_embed_max_size": 384},
        scheduler={"shift": 3.0, "use_dynamic_shifting": False},
        figures=(_SD35_TABLE_4,),
    ),
    Known(
        names=("stabilityai/stable-diffusion-3.5-large",),
        transformer=_SD3
        | {"num_layers": 38, "num_attention_heads": 38, "qk_norm": "rms_norm", "pos_embed_max_size": 192},
        scheduler={"shift": 3.0, "use_dynamic_shifting": False},
    ),
    Known(
        names=("stabilityai/stable-diffusion-3-medium-diffusers",),
        transformer=_SD3 | {"num_layers": 24, "num_attention_heads": 24, "qk_norm": None, "pos_embed_max_size": 192},
        scheduler={"shift": 3.0, "use_dynamic_shifting": False},
    ),
)


def recognise(transformer: Mapping[str, Any]) -> Known | None:
    """The published model with these numbers (a transformer's config.json)."""
    fits = (known for known in MODELS if all(transformer.get(key) == value for key, value in known.transformer.items()))
    return next(fits, None)


def by_id(hub_id: str) -> Known | None:
    """The published model of that name."""
    return next((known for known in MODELS if hub_id.partition("@")[0] in known.names), None)


def of_reward(name: str) -> list[str]:
    """What the paper's untrained models score with a reward: a sentence a table."""
    sentences = []
    for known in MODELS:
        for figures in known.figures:
            found = [f"{key} {score:g}" for key, score in figures.scores.items() if key.split()[0] == name]
            if found:
                sentences.append(f"{known.names[0]}: {', '.join(found)} ({figures.where})")
    return sentences

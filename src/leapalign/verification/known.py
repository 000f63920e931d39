"""The published models by the numbers of their transformers, and what the paper measured on them (arXiv 2604.15311).

Sizes and schedulers are those that ship for plans (leapalign.models.published), public facts that could not be
compared with the hub's own files when this was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leapalign.models.published import PIPELINES


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
SCHEDULER = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
SIZES = (
    *("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim"),
    *("pooled_projection_dim", "in_channels", "guidance_embeds", "qk_norm", "pos_embed_max_size"),
)


def _known(*names: str, figures: tuple[Figures, ...] = ()) -> Known:
    """The numbers of the first of these, which the others share."""
    parts = PIPELINES[names[0]].parts
    (kind, transformer), (_, scheduler) = parts["transformer"], parts["scheduler"]
    unsaid = {"qk_norm": None} if kind.endswith("SD3Transformer2DModel") else {}
    return Known(
        names=names,
        transformer=unsaid | {key: transformer[key] for key in SIZES if key in transformer},
        scheduler={"use_dynamic_shifting": False} | {key: scheduler[key] for key in SCHEDULER if key in scheduler},
        figures=figures,
    )


MODELS = (
    _known(
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-Krea-dev",
        figures=(_FLUX_TABLE_2, _FLUX_TABLE_3, _FLUX_GENEVAL),
    ),
    _known("black-forest-labs/FLUX.1-schnell"),
    _known("stabilityai/stable-diffusion-3.5-medium", figures=(_SD35_TABLE_4,)),
    _known("stabilityai/stable-diffusion-3.5-large"),
    _known("stabilityai/stable-diffusion-3-medium-diffusers"),
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

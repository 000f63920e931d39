"""How large a prompt's features are, by pipeline: what the text encoders give, without running them.

A further family is one more entry of TEXTS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from leapalign.errors import UserError
from leapalign.models.base import Text
from leapalign.storage.pipeline_folder import PipelineFolder


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Of one prompt."""

    tokens: tuple[int, int]  # length, width; where texts have their own lengths, the longest
    pooled: int = 0  # width; 0 = none
    masked: bool = False  # one more byte a token

    def empty(self, rows: int, dtype: torch.dtype, mode: AbstractContextManager[Any]) -> Text:
        """Tokens and pooled features made in `mode`, so that they may be fake, and a real mask, which families read.

        With several rows the texts are of different lengths.
        """
        with mode:
            tokens = torch.zeros(rows, *self.tokens, dtype=dtype)
            pooled = torch.zeros(rows, self.pooled, dtype=dtype) if self.pooled else None
        if not self.masked:
            return Text(tokens, pooled)
        mask = torch.ones(rows, self.tokens[0], dtype=torch.bool)
        mask[1:, -1] = False
        return Text(tokens, pooled, mask)

    def bytes(self, dtype: torch.dtype) -> int:
        length, width = self.tokens
        return (length * width + self.pooled) * dtype.itemsize + (length if self.masked else 0)


def text_shape(config: Any, folder: PipelineFolder, kind: str, policy: Any) -> TextShape:
    """`config`: the run's model; `kind`: its pipeline's class. UserError for a family without an entry."""
    if kind not in TEXTS:
        raise UserError(f"--dry-run does not know the prompts' features of a {kind}; it knows {', '.join(TEXTS)}")
    return TEXTS[kind](config, folder, policy.config)


def _flux(config: Any, folder: PipelineFolder, policy: Any) -> TextShape:
    """T5's tokens, CLIP's pooled features."""
    return TextShape(
        tokens=(config.max_sequence_length, policy.joint_attention_dim), pooled=policy.pooled_projection_dim
    )


def _sd3(config: Any, folder: PipelineFolder, policy: Any) -> TextShape:
    """CLIP's tokens before T5's (or before zeros in their place), both CLIPs' pooled features."""
    clip = json.loads((folder.path / "text_encoder" / "config.json").read_text())
    length = clip.get("max_position_embeddings", 77) + config.max_sequence_length
    return TextShape(tokens=(length, policy.joint_attention_dim), pooled=policy.pooled_projection_dim)


def _flux2(config: Any, folder: PipelineFolder, policy: Any) -> TextShape:
    """Several layers of a language model side by side, always filled up."""
    return TextShape(tokens=(config.max_sequence_length, policy.joint_attention_dim))


def _qwen_image(config: Any, folder: PipelineFolder, policy: Any) -> TextShape:
    return TextShape(tokens=(config.max_sequence_length, policy.joint_attention_dim), masked=True)


def _z_image(config: Any, folder: PipelineFolder, policy: Any) -> TextShape:
    return TextShape(tokens=(config.max_sequence_length, policy.cap_feat_dim), masked=True)


TEXTS: dict[str, Callable[[Any, PipelineFolder, Any], TextShape]] = {
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "Flux2KleinPipeline": _flux2,
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
}

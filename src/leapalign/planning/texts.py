"""How large a prompt's features are, by pipeline: what the text encoders give, without running them.

A further family is one more entry of TEXTS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from leapalign.errors import UserError
from leapalign.models.base import Text
from leapalign.models.folder import PipelineFolder


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Of one prompt."""

    tokens: tuple[int, int]  # length, width
    pooled: int = 0  # width; 0 = none
    masked: bool = False  # one more byte a token

    def empty(self, rows: int, dtype: torch.dtype) -> Text:
        return Text(
            torch.zeros(rows, *self.tokens, dtype=dtype),
            torch.zeros(rows, self.pooled, dtype=dtype) if self.pooled else None,
            torch.ones(rows, self.tokens[0], dtype=torch.bool) if self.masked else None,
        )

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


TEXTS: dict[str, Callable[[Any, PipelineFolder, Any], TextShape]] = {
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
}

"""Prompts are encoded once: a cache on the CPU, and text encoders that are in memory only while it is being filled.

Prompts go through the encoders one at a time, so that an embedding never depends, not even in its last bit, on
which other prompts were encoded with it: a resumed run sees the same numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from leapalign.models.base import Text

Encoder = Callable[[str], Text]  # one prompt -> one row


class PromptCache:
    def __init__(self, load_encoder: Callable[[], Encoder], device: str) -> None:
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None
        self._rows: dict[str, Text] = {}
        self._device = device

    @property
    def holds_encoders(self) -> bool:
        """Whether the text encoders are in memory now."""
        return self._encoder is not None

    def prepare(self, prompts: Sequence[str]) -> None:
        self._fill(prompts)
        self.free()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """[B, ...] on the device; loads the encoders if a prompt is new, and keeps them for the next new one."""
        self._fill(prompts)
        rows = [self._rows[prompt] for prompt in prompts]
        return Text(torch.cat([r.tokens for r in rows]), torch.cat([r.pooled for r in rows])).to(self._device)

    def free(self) -> None:
        self._encoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fill(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt in self._rows:
                continue
            if self._encoder is None:
                self._encoder = self._load_encoder()
            with torch.no_grad():  # text encoders are frozen, and the cache outlives every graph
                self._rows[prompt] = self._encoder(prompt).to("cpu")

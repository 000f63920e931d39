"""Prompts are encoded once: a cache on the CPU, and text encoders that are in memory only while it is being filled.

Prompts go through the encoders in batches of one fixed size, filled up where fewer are new: at one shape of every
product, an embedding does not depend on which prompts were encoded with it (tested bit for bit on CPU), so a resumed
run sees the same numbers as the run that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from leapalign.models.base import Text

Encoder = Callable[[list[str]], Text]  # prompts -> one row each
BATCH = 16  # prompts an encoder call, always


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
        self.fill(prompts)
        self.free()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """[B, ...] on the device; loads the encoders if a prompt is new, and keeps them for the next new one."""
        self.fill(prompts)
        return Text.stack([self._rows[prompt] for prompt in prompts]).to(self._device)

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode those that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(new), BATCH):
            self._encode(new[start : start + BATCH])

    def free(self) -> None:
        if self._encoder is None:
            return
        self._encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, prompts: list[str]) -> None:
        if self._encoder is None:
            self._encoder = self._load_encoder()
        with torch.no_grad():  # text encoders are frozen, and the cache outlives every graph
            text = self._encoder(prompts + prompts[-1:] * (BATCH - len(prompts))).to("cpu")
        for i, prompt in enumerate(prompts):
            self._rows[prompt] = text.row(i)

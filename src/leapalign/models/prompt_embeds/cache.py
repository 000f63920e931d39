"""Prompt embeds, computed once and kept in memory and, for large text encoders, on disk.

Text encoders load only when a prompt is new. Prompts are encoded in batches of one fixed size, padded with repeats:
with the same shapes in every matrix product, embeds do not depend on the rest of the batch (tested bit for bit on CPU),
so resumed runs and runs on other ranks see the same numbers. Entries on disk (store.py) have the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence

import torch

from leapalign.models.base import Text
from leapalign.models.prompt_embeds.store import PromptStore

Encoder = Callable[[list[str]], Text]  # prompts -> one row each
BATCH = 16  # prompts per encoder call, always
MEMORY = 4 * 2**30  # bytes of embeds kept in memory if the rest is on disk: 1,000 of FLUX's


class PromptCache:
    """Prompt embeds by prompt: from memory, then from the store on disk, then from the text encoders.

    Without a store all embeds stay in memory; with one, the most recently used, up to `memory` bytes.
    """

    def __init__(
        self, load_encoder: Callable[[], Encoder], device: str, store: PromptStore | None = None, memory: int = MEMORY
    ) -> None:
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None
        self._rows: OrderedDict[str, Text] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._known: set[str] = set()  # in memory or on disk
        self._device = device
        self.store = store
        self._memory = memory

    @property
    def holds_encoders(self) -> bool:
        """True while the text encoders are in memory."""
        return self._encoder is not None

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the new prompts, then free the text encoders."""
        self.fill(prompts)
        self.free()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Return embeds [B, ...] on the device; loads the encoders for a new prompt, and keeps them."""
        self.fill(prompts)
        return Text.stack([self._row(prompt) for prompt in prompts]).to(self._device)

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are neither in memory nor on disk."""
        new = self.missing(prompts)
        self.encode(new, room_for=len(new))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """List the prompts that are neither in memory nor on disk, without repeats, in the same order."""
        asked = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        on_disk = [prompt for prompt in asked if self.store and self.store.has(prompt)]
        self._known.update(on_disk)
        return [prompt for prompt in asked if prompt not in self._known]

    def keep(self, prompts: Sequence[str]) -> None:
        """Protect these prompts' entries on disk from pruning by this process, whoever writes them."""
        if self.store:
            self.store.needed.update(self.store.file(prompt) for prompt in prompts)

    def encode(
        self,
        prompts: Sequence[str],
        *,
        encoder: Encoder | None = None,
        room_for: int = 0,
        own: Container[str] | None = None,
    ) -> None:
        """Encode all of these prompts; store and remember those in `own` (None: all).

        `encoder`: replaces the cache's own. `room_for`: number of entries to free disk space for first.
        """
        if encoder is not None:
            self._encoder = encoder
        for start in range(0, len(prompts), BATCH):
            self._encode(list(prompts[start : start + BATCH]), room_for if start == 0 else 0, own)

    def free(self) -> None:
        """Drop the text encoders."""
        if self._encoder is None:
            return
        self._encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _row(self, prompt: str) -> Text:
        """Return one prompt's embeds: from memory, from disk, or encoded again if the entry is damaged or pruned."""
        if prompt not in self._rows:
            found = self.store.read(prompt) if self.store else None
            if found is None:
                self._encode([prompt], room_for=1)
            else:
                self._remember(prompt, found)
        self._rows.move_to_end(prompt)
        return self._rows[prompt]

    def _encode(self, prompts: list[str], room_for: int, own: Container[str] | None = None) -> None:
        """Encode at most BATCH prompts in one call."""
        if self._encoder is None:
            self._encoder = self._load_encoder()
        with torch.no_grad():  # text encoders are frozen, and the cache outlives every graph
            text = self._encoder(prompts + prompts[-1:] * (BATCH - len(prompts))).to("cpu")
        if self.store and room_for:
            self.store.make_room(room_for, _bytes(text) // BATCH)
        kept = {i: prompt for i, prompt in enumerate(prompts) if own is None or prompt in own}
        for i, prompt in kept.items():
            row = text.row(i)
            if self.store:
                self.store.write(prompt, row)
            self._remember(prompt, row)
        self._known.update(kept.values())

    def _remember(self, prompt: str, row: Text) -> None:
        """Keep a row in memory; with a store, drop the least recently used rows above `memory` bytes."""
        self._rows[prompt] = row
        self._bytes += _bytes(row)
        while self.store and self._bytes > self._memory and len(self._rows) > 1:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _bytes(oldest)


def _bytes(text: Text) -> int:
    tensors = (text.tokens, text.pooled, text.mask)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

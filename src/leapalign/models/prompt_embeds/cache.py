"""Prompt embeds, computed once: kept in memory and, where it is worth it, on disk; text encoders load only for that.

Prompts go through the encoders in batches of one fixed size, padded with repeats: with the same shapes in every matrix
product, an embedding does not depend on the prompts encoded beside it (tested bit for bit on CPU). So a resumed run,
and a run on other ranks, see the same numbers. An entry on disk (store.py) has the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence

import torch

from leapalign.models.base import Text
from leapalign.models.prompt_embeds.store import PromptStore

Encoder = Callable[[list[str]], Text]  # prompts -> one row each
BATCH = 16  # prompts an encoder call, always
MEMORY = 4 * 2**30  # bytes of rows that stay in memory where the others can be read from disk: 1,000 of FLUX's


class PromptCache:
    """Prompt embeds by prompt: from memory, then from the store on disk, then from the text encoders.

    Without a store all rows stay in memory; with one, those used last, up to `memory` bytes.
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
        """Whether the text encoders are in memory now."""
        return self._encoder is not None

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the new ones among these prompts, then free the text encoders."""
        self.fill(prompts)
        self.free()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """[B, ...] on the device; loads the encoders if a prompt is new, and keeps them for the next new one."""
        self.fill(prompts)
        return Text.stack([self._row(prompt) for prompt in prompts]).to(self._device)

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are neither in memory nor on disk."""
        new = self.missing(prompts)
        self.encode(new, room_for=len(new))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are neither in memory nor on disk, without repeats, in the same order."""
        asked = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        on_disk = [prompt for prompt in asked if self.store and self.store.has(prompt)]
        self._known.update(on_disk)
        return [prompt for prompt in asked if prompt not in self._known]

    def keep(self, prompts: Sequence[str]) -> None:
        """Let this process prune none of these prompts' entries on disk, whoever writes them."""
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
        """Run the encoder on all of these prompts, and write and remember those in `own` (None: all).

        `encoder`: in place of the cache's own; `room_for`: number of entries for which room is made on disk first.
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
        """One prompt's embeds: from memory, from disk, or encoded again if its entry is damaged or was pruned."""
        if prompt not in self._rows:
            found = self.store.read(prompt) if self.store else None
            if found is None:
                self._encode([prompt], room_for=1)
            else:
                self._remember(prompt, found)
        self._rows.move_to_end(prompt)
        return self._rows[prompt]

    def _encode(self, prompts: list[str], room_for: int, own: Container[str] | None = None) -> None:
        """Encode at most BATCH prompts by one call."""
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
        """Keep a row in memory; with a store, drop the least recently used rows above the limit of bytes."""
        self._rows[prompt] = row
        self._bytes += _bytes(row)
        while self.store and self._bytes > self._memory and len(self._rows) > 1:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _bytes(oldest)


def _bytes(text: Text) -> int:
    tensors = (text.tokens, text.pooled, text.mask)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

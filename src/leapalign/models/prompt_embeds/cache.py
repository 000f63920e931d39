"""Prompts are encoded once: into memory and, where it is worth it, onto disk; the text encoders are loaded only for it.

Prompts go through the encoders in batches of one fixed size, filled up where fewer are new: at one shape of every
product, an embedding does not depend on which prompts were encoded with it (tested bit for bit on CPU), so a resumed
run sees the same numbers as the run that never stopped. An entry of the disk (`prompt_store`) has the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from leapalign.models.base import Text
from leapalign.models.prompt_embeds.store import PromptStore

Encoder = Callable[[list[str]], Text]  # prompts -> one row each
BATCH = 16  # prompts an encoder call, always
MEMORY = 4 * 2**30  # bytes of rows that stay in memory where the others can be read from disk: 1,000 of FLUX's


class PromptCache:
    """Rows in memory, behind them a store on disk, behind it the encoders. Without a store, memory holds all rows."""

    def __init__(
        self, load_encoder: Callable[[], Encoder], device: str, store: PromptStore | None = None, memory: int = MEMORY
    ) -> None:
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None
        self._rows: OrderedDict[str, Text] = OrderedDict()  # the one used last stands last
        self._bytes = 0
        self._known: set[str] = set()  # in memory or on disk
        self._device = device
        self._store = store
        self._memory = memory

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
        return Text.stack([self._row(prompt) for prompt in prompts]).to(self._device)

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode those that are neither in memory nor on disk."""
        self.encode(self.missing(prompts))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are neither in memory nor on disk, each once."""
        asked = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        on_disk = [prompt for prompt in asked if self._store and self._store.has(prompt)]
        self._known.update(on_disk)
        return [prompt for prompt in asked if prompt not in self._known]

    def encode(self, prompts: list[str], encoder: Encoder | None = None) -> None:
        """Encode all of these, by `encoder` where it is given, and remember them."""
        if encoder is not None:
            self._encoder = encoder
        for start in range(0, len(prompts), BATCH):
            self._encode(prompts[start : start + BATCH], of=len(prompts) if start == 0 else 0)

    def free(self) -> None:
        if self._encoder is None:
            return
        self._encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _row(self, prompt: str) -> Text:
        """From memory, from disk, or, where an entry is damaged or another process has pruned it, encoded again."""
        if prompt not in self._rows:
            found = self._store.read(prompt) if self._store else None
            if found is None:
                self._encode([prompt], of=1)
            else:
                self._remember(prompt, found)
        self._rows.move_to_end(prompt)
        return self._rows[prompt]

    def _encode(self, prompts: list[str], of: int) -> None:
        """`of`: with the first batch of a series the number of its prompts, for all of which room is made on disk."""
        if self._encoder is None:
            self._encoder = self._load_encoder()
        with torch.no_grad():  # text encoders are frozen, and the cache outlives every graph
            text = self._encoder(prompts + prompts[-1:] * (BATCH - len(prompts))).to("cpu")
        if self._store and of:
            self._store.make_room(of, _bytes(text) // BATCH)
        for i, prompt in enumerate(prompts):
            row = text.row(i)
            if self._store:
                self._store.write(prompt, row)
            self._remember(prompt, row)
        self._known.update(prompts)

    def _remember(self, prompt: str, row: Text) -> None:
        """Keep it in memory; with a store, the rows used least recently leave when there are too many bytes."""
        self._rows[prompt] = row
        self._bytes += _bytes(row)
        while self._store and self._bytes > self._memory and len(self._rows) > 1:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _bytes(oldest)


def _bytes(text: Text) -> int:
    tensors = (text.tokens, text.pooled, text.mask)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

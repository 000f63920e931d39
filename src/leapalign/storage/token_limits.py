"""Count prompts that are longer than a text encoder or a reward reads, for a warning at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """Number of texts that are longer than a token limit."""

    count: int
    limit: int  # tokens read per text, special ones included


def count_longer(tokenizer: Any, texts: Sequence[str], limit: int) -> TooLong:
    """Count the texts of more than `limit` tokens, special ones included. `tokenizer`: one of transformers'."""
    rows = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"] if texts else []
    return TooLong(count=sum(len(row) > limit for row in rows), limit=limit)


def sentence(reader: str, found: TooLong, total: int) -> str:
    """Return a sentence with the number of `total` prompts that the reader (an encoder, a reward) truncates."""
    return (
        f"{reader} reads {found.limit} tokens of a prompt: "
        f"{found.count} of {total} prompts are longer and are truncated"
    )

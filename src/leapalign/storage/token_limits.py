"""Prompts that are longer than what a text encoder or a reward reads: counted, and told once at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """How many texts are longer than what is read of them."""

    count: int
    limit: int  # tokens that are read, special ones included


def count_longer(tokenizer: Any, texts: Sequence[str], limit: int) -> TooLong:
    """Count the texts of more than `limit` tokens, special ones included. `tokenizer`: one of transformers'."""
    rows = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"] if texts else []
    return TooLong(count=sum(len(row) > limit for row in rows), limit=limit)


def sentence(reader: str, found: TooLong, total: int) -> str:
    """Say how many of `total` prompts the reader (an encoder, a reward) cuts off."""
    return (
        f"{reader} reads {found.limit} tokens of a prompt: "
        f"{found.count} of {total} prompts are longer and are truncated"
    )

"""Token limits of a family's text encoders, for the prompt or its chat format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from leapalign.storage.token_limits import TooLong, count_longer, sentence


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """A text encoder's tokenizer and token limit."""

    name: str  # component of the encoder: text_encoder, text_encoder_2, ...
    tokenizer: Any  # a transformers tokenizer
    limit: int  # tokens that are read, including special tokens and the chat format
    text: Callable[[str], str] = str  # prompt -> input of the tokenizer: the prompt, or its chat format
    dropped: int = 0  # further leading tokens of the chat format, which give no embeds

    def longer(self, prompts: Sequence[str]) -> TooLong:
        """Count the prompts that exceed the limit, so that their ends are not read."""
        found = count_longer(self.tokenizer, [self.text(p) for p in prompts], self.limit + self.dropped)
        return TooLong(count=found.count, limit=self.limit)

    def longest(self, prompts: Sequence[str]) -> int:
        """Number of tokens in the longest prompt's embeds."""
        rows = self.tokenizer([self.text(prompt) for prompt in prompts], verbose=False)["input_ids"]
        return min(self.limit, max(len(row) for row in rows) - self.dropped)


def chat_format(tokenizer: Any, *, thinking: bool) -> Callable[[str], str]:
    """Return prompt -> user turn in Qwen3's chat format, as in the pipelines of FLUX.2 and Z-Image."""

    def text(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return text


def tell_longer(readers: Sequence[TextReader], prompts: Sequence[str]) -> None:
    """Print one line on stderr for each text encoder that does not read the end of some of the prompts."""
    texts = list(dict.fromkeys(prompts))
    for reader in readers:
        found = reader.longer(texts)
        if found.count:
            print(sentence(f"the model's {reader.name}", found, len(texts)), file=sys.stderr)


@contextmanager
def told_already() -> Iterator[None]:
    """Context that silences diffusers' warnings of truncated prompts, which leapalign has already printed."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""What the text encoders of a family read of a prompt: so many tokens, of the prompt or of its chat format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from leapalign.storage.token_limits import TooLong, count_longer, sentence


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """A text encoder's tokenizer, and how many tokens reach the encoder."""

    name: str  # the encoder's component: text_encoder, text_encoder_2, ...
    tokenizer: Any  # of transformers
    limit: int  # tokens that are read, special ones and the chat format included
    text: Callable[[str], str] = str  # prompt -> what the tokenizer gets: the prompt, or its chat format
    dropped: int = 0  # leading tokens of the chat format that are read besides and give no embeds

    def longer(self, prompts: Sequence[str]) -> TooLong:
        """Count the prompts whose ends are not read."""
        found = count_longer(self.tokenizer, [self.text(p) for p in prompts], self.limit + self.dropped)
        return TooLong(count=found.count, limit=self.limit)

    def longest(self, prompts: Sequence[str]) -> int:
        """Tokens that the embeds of the longest prompt have."""
        rows = self.tokenizer([self.text(prompt) for prompt in prompts], verbose=False)["input_ids"]
        return min(self.limit, max(len(row) for row in rows) - self.dropped)


def chat_format(tokenizer: Any, *, thinking: bool) -> Callable[[str], str]:
    """prompt -> the user's turn in the chat format of a Qwen3, as FLUX.2's and Z-Image's pipelines write it."""

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
    """Inside, diffusers does not repeat for every batch of prompts what it leaves out of them."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""Extract the quoted words of a prompt."""

from __future__ import annotations

import re

from leapalign.errors import UserError

# A single quotation mark inside a word is an apostrophe.
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'(.+?)'(?!\w)|(?<!\w)‘(.+?)’(?!\w)")


def quoted_text(name: str, prompt: str) -> str:
    """Return a prompt's quotes: 'a sign that says "Stop" and "here"' -> 'Stop here'. Raises UserError without any."""
    quotes = ["".join(groups) for groups in QUOTED.findall(prompt)]
    words = " ".join(quotes).split()
    if not words:
        raise UserError(
            f"{name}: the prompt {prompt!r} quotes no words; put the text that the image is to show in quotation "
            'marks, as in: a sign that says "open"'
        )
    return " ".join(words)

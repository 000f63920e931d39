"""What a command prints on stdout."""

from __future__ import annotations

import json
from typing import Any


def answer(value: Any, as_json: bool, text: str) -> None:
    """The text, or with --json the value alone."""
    print(json.dumps(value, indent=2) if as_json else text)

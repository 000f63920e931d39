"""Print a command's result on stdout."""

from __future__ import annotations

import json
from typing import Any


def answer(value: Any, as_json: bool, text: str) -> None:
    """Print the text or, with --json, only the value."""
    print(json.dumps(value, indent=2) if as_json else text)

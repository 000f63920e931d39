"""What a source of prompts is: a frozen dataclass with `load() -> list[Prompt]`; training/batches.py orders them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Prompt:
    """One text, and its GenEval metadata ({"tag", "include", "exclude"?, "prompt"}) if it has any."""

    text: str
    metadata: dict[str, Any] | None = None


class Prompts(Protocol):
    """Where prompts come from."""

    name: ClassVar[str]

    def load(self) -> list[Prompt]:
        """All prompts, always in the same order."""
        ...

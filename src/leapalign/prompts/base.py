"""What a source of prompts is: a frozen dataclass with `load() -> list[Prompt]`; training/batches.py orders them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from leapalign.errors import UserError

MOST = 10**7  # generated prompts: gigabytes


def check_generated(name: str, num: int, seed: int) -> None:
    """Raise UserError unless so many prompts can be generated, by that seed."""
    if not 1 <= num <= MOST or seed < 0:
        raise UserError(f"{name} prompts: num {num}, seed {seed}; expected 1 to {MOST}, and a seed of at least 0")


LONGEST = 10_000  # letters: encoders read some hundred words, and tokenizers take minutes for a million letters


def check_text(text: str, where: str) -> str:
    """The text without spaces around it. UserError, with `where` it stands, for one that no prompt is as long as."""
    if len(text) > LONGEST:
        raise UserError(f"{where}: a prompt of {len(text)} letters; expected at most {LONGEST}")
    return text.strip()


@dataclass(frozen=True)
class Prompt:
    """One text, and its GenEval metadata ({"tag", "include", "exclude"?, "prompt"}) if it has any."""

    text: str
    metadata: dict[str, Any] | None = None


class Prompts(Protocol):
    """Where prompts come from."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]

    def load(self) -> list[Prompt]:
        """All prompts, always in the same order."""
        ...


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset repository on the hub."""

    repo: str
    file: str
    bytes: int  # about, for plans


@runtime_checkable
class PublishedPrompts(Prompts, Protocol):
    """A published set: one file of the hub, or a copy of it on disk."""

    @property
    def path(self) -> str:
        """The copy on disk; empty = from the hub."""
        ...

    @property
    def source(self) -> HubFile:
        """The file on the hub."""
        ...

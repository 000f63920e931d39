"""Protocol of a source of prompts: a frozen dataclass with `load() -> list[Prompt]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from leapalign.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MOST = 10**7  # most prompts to generate: gigabytes


def check_generated(name: str, num: int, seed: int) -> None:
    """Raise UserError unless `num` prompts can be generated from `seed`."""
    if not 1 <= num <= MOST or seed < 0:
        raise UserError(f"{name} prompts: num {num}, seed {seed}; expected 1 to {MOST}, and a seed of at least 0")


LONGEST = 10_000  # characters; encoders read some hundred words, and tokenizers take minutes for a million characters


def check_text(text: str, where: str) -> str:
    """Strip surrounding spaces. Raises UserError, starting with `where`, if no encoder can read the text."""
    if len(text) > LONGEST:
        raise UserError(f"{where}: a prompt of {len(text)} characters; expected at most {LONGEST}")
    if "\0" in text:
        raise UserError(f"{where}: contains a NUL character; remove it")
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), "")
    if half:
        raise UserError(
            f"{where}: \\u{ord(half):04x} is one half of a character (a text cut within an emoji, or bytes that are "
            "not UTF-8); leave it out, or write the whole character"
        )
    return text.strip()


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its GenEval metadata ({"tag", "include", "exclude"?, "prompt"}) if it has any."""

    text: str
    metadata: dict[str, Any] | None = None


def spread(values: Sequence[T], num: int) -> list[T]:
    """Select at most `num` of the values, evenly spaced."""
    num = min(num, len(values))
    return [values[i * len(values) // num] for i in range(num)]


class Prompts(Protocol):
    """A source of prompts."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]

    def load(self) -> list[Prompt]:
        """Return all prompts, always in the same order."""
        ...


class ImageMonitor(Protocol):
    """Measures images of a set of prompts by what the prompts say, without a reward."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its numbers, as metrics."""
        ...

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Measure each image: [B, 3, H, W] in [0, 1], with its prompt -> [B, K] on the CPU."""
        ...

    def summary(self, values: Tensor) -> dict[str, float]:
        """Return the numbers of N images from their measures [N, K]."""
        ...


@runtime_checkable
class MonitoredPrompts(Prompts, Protocol):
    """Prompts with a monitor of their own."""

    def monitor(self) -> ImageMonitor: ...


@dataclass(frozen=True)
class HubFile:
    """A file in a dataset repository on the hub."""

    repo: str
    file: str
    bytes: int  # approximate, for plans


@runtime_checkable
class PublishedPrompts(Prompts, Protocol):
    """A published set: one file of the hub, or a copy of it on disk."""

    @property
    def path(self) -> str:
        """Path of the copy on disk; empty = from the hub."""
        ...

    @property
    def source(self) -> HubFile:
        """The file on the hub."""
        ...

"""Places and values in words, for messages about a run's settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PluginKind:
    """A field that takes a plug-in: where the package's own classes are, and how each class is called."""

    folder: str  # of leapalign
    calls: Mapping[str, int]  # method -> number of arguments that it must take


KINDS = {  # by name of the field
    "model": PluginKind("models", {"load": 4}),  # device, dtype, tuning, loading
    "method": PluginKind("methods", {"draw": 3, "__call__": 4}),
    "reward": PluginKind("rewards", {"load": 2}),  # device, dtype
    "prompts": PluginKind("prompts", {"load": 0}),
    "tuning": PluginKind("tuning", {"load_policy": 4, "initialise": 2, "in_update": 3, "save": 2, "load_tuned": 4}),
}


@dataclass(frozen=True)
class Where:
    """The place of a value, for messages: `run.json: rewards[0].reward`."""

    source: str  # a file, or the word that the user typed; empty: a value in Python
    path: str = ""

    def key(self, name: str) -> Where:
        return Where(self.source, f"{self.path}.{name}" if self.path else name)

    def item(self, index: int) -> Where:
        return Where(self.source, f"{self.path}[{index}]")

    @property
    def kind(self) -> PluginKind | None:
        return KINDS.get(self.path.rpartition(".")[2])

    @property
    def kind_of(self) -> str:
        """` of leapalign.models`, for the field `model`."""
        return f" of leapalign.{self.kind.folder}" if self.kind else ""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.source, self.path])) or "value"


def suggestion(word: Any, choices: Iterable[Any]) -> str:
    """'; did you mean x?' where one of the choices is close, else nothing."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def described(value: Any) -> str:
    """A value that came in place of another, in a few words: `a text "abc"`, `the class SD3`, `a Flux`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "nothing (None, null)"
    if type(value) in _WORDS:
        return f"{kind_word(type(value))} {short(value)}"
    if isinstance(value, types.FunctionType):
        return f"the function {value.__name__}"
    return f"a {type(value).__name__}"


_WORDS = {dict: "an object", list: "a list", tuple: "a tuple", str: "a text", int: "a whole number", float: "a number"}
_WORDS |= {bool: "true or false", types.NoneType: "null"}


def kind_word(kind: Any) -> str:
    return _WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def short(value: Any) -> str:
    """JSON of a value, or what Python calls it, cut to 60 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def listed(items: Iterable[Any]) -> str:
    return ", ".join(repr(item) for item in items)


def call_of(cls: Any) -> str:
    """A dataclass with its required fields: `RewardTerm(reward=..., threshold=...)`."""
    return f"{cls.__name__}({', '.join(f'{name}=...' for name in required(cls))})"


def required(cls: Any) -> list[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def how_to_call(value: Any) -> str:
    """Where a class stands for its instance: how to make one."""
    is_config = isinstance(value, type) and dataclasses.is_dataclass(value)
    return f"; write {call_of(value)}" if is_config else ""

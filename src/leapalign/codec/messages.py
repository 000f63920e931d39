"""Describe places and values in error messages about a run's settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PluginKind:
    """A field that takes a plug-in: the folder of its built-in classes, and the methods that are called."""

    folder: str  # in leapalign
    calls: Mapping[str, int]  # method -> number of positional arguments
    also: tuple[str, ...] = ()  # other folders with classes of this kind
    instead: Mapping[str, int] = field(default_factory=dict)  # calls of a second protocol of this kind, if there is one


KINDS = {  # by field name
    "model": PluginKind("models", {"load": 4}, ("studies.arena",)),  # device, dtype, tuning, loading
    "method": PluginKind(
        "methods", {"draw": 3, "__call__": 4}, instead={"draw": 3, "roll_out": 4, "loss": 4}
    ),  # direct gradients, or policy gradients
    "reward": PluginKind("rewards", {"load": 2}, ("shapeworld",)),  # device, dtype
    "prompts": PluginKind("prompts", {"load": 0}),
    "tuning": PluginKind("tuning", {"load_policy": 4, "initialise": 2, "in_update": 3, "save": 2, "load_tuned": 5}),
}


@dataclass(frozen=True)
class Where:
    """Place of a value in messages: `run.json: rewards[0].reward`."""

    source: str  # a file or a command-line argument; empty: a value in Python
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
        """Return ` of leapalign.models` for the field `model`."""
        return f" of leapalign.{self.kind.folder}" if self.kind else ""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.source, self.path])) or "value"


def suggestion(word: Any, choices: Iterable[Any]) -> str:
    """Return '; did you mean x?' if one of the choices is close, else an empty string."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def described(value: Any) -> str:
    """Describe an unexpected value briefly: `a text "abc"`, `the class SD3`, `a Flux`."""
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
    """Return a value's JSON, or its repr, cut to 60 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def listed(items: Iterable[Any]) -> str:
    return ", ".join(repr(item) for item in items)


def call_of(cls: Any) -> str:
    """Return a dataclass call with its required fields: `RewardTerm(reward=..., threshold=...)`."""
    return f"{cls.__name__}({', '.join(f'{name}=...' for name in required(cls))})"


def required(cls: Any) -> list[str]:
    """List the names of fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def how_to_call(value: Any) -> str:
    """Return '; write X(...)' if a dataclass was given in place of its instance, else an empty string."""
    is_config = isinstance(value, type) and dataclasses.is_dataclass(value)
    return f"; write {call_of(value)}" if is_config else ""

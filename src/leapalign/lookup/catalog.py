"""The catalog of `leapalign list`: the configuration classes of each kind of plug-in, and the recipes.

Each package lists its own classes in `__all__`; nothing registers itself, and nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

KINDS = ("methods", "models", "rewards", "prompts", "tuning", "recipes")


def listing(kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return kind -> [{"name", "type", "text", and for rewards their facts}]."""
    return {kind: list(_recipes() if kind == "recipes" else _plugins(kind)) for kind in kinds}


def _recipes() -> Iterable[dict[str, Any]]:
    from leapalign.recipes import RECIPES

    for name, recipe in RECIPES.items():
        yield {"name": name, "type": f"{recipe.__module__}.{recipe.__name__}", "text": _first_line(recipe)}


def _plugins(kind: str) -> Iterable[dict[str, Any]]:
    for cls in plugins(kind):
        named = {"name": cls.name, "type": f"{cls.__module__}.{cls.__name__}", "text": _first_line(cls)}
        yield named | facts(cls)


def plugins(kind: str) -> list[Any]:
    """Return the configuration classes that the package of a kind lists in its `__all__`: dataclasses with a `name`."""
    package = importlib.import_module(f"leapalign.{kind}")
    listed = [getattr(package, name) for name in package.__all__]
    return [cls for cls in listed if dataclasses.is_dataclass(cls) and isinstance(getattr(cls, "name", None), str)]


def facts(cls: type) -> dict[str, Any]:
    """Return the other class variables of a configuration: a reward's licence, range, resolution, ..."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    plain = {k: v for k, v in vars(cls).items() if isinstance(v, (str, bool, int, float)) and not k.startswith("_")}
    return {k: v for k, v in plain.items() if k not in fields | {"name"}}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]

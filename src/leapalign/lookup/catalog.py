"""What `leapalign list` shows: the configuration classes found in each folder, and the recipes. Nothing registers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

KINDS = ("methods", "models", "rewards", "prompts", "tuning", "recipes")


def listing(kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """kind -> [{"name", "type", "text", and for rewards their facts}]."""
    return {kind: list(_recipes() if kind == "recipes" else _plugins(kind)) for kind in kinds}


def _recipes() -> Iterable[dict[str, Any]]:
    from leapalign.recipes import RECIPES

    for name, recipe in RECIPES.items():
        yield {"name": name, "type": f"{recipe.__module__}.{recipe.__name__}", "text": _first_line(recipe)}


def _plugins(folder: str) -> Iterable[dict[str, Any]]:
    package = importlib.import_module(f"leapalign.{folder}")
    inner = [f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    for module in (package, *map(importlib.import_module, inner)):
        for cls in vars(module).values():
            if _is_config(cls, module.__name__):
                named = {"name": cls.name, "type": f"{cls.__module__}.{cls.__name__}", "text": _first_line(cls)}
                yield named | facts(cls)


def _is_config(cls: Any, module: str) -> bool:
    """A dataclass of this module with a name for tables."""
    own = isinstance(cls, type) and cls.__module__ == module and dataclasses.is_dataclass(cls)
    return own and isinstance(getattr(cls, "name", None), str)


def facts(cls: type) -> dict[str, Any]:
    """The other class variables: a reward's licence, range, resolution, ..."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    plain = {k: v for k, v in vars(cls).items() if isinstance(v, (str, bool, int, float)) and not k.startswith("_")}
    return {k: v for k, v in plain.items() if k not in fields | {"name"}}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]

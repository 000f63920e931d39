"""The reward that a word names, and the rewards that belong to a model."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from leapalign.codec import suggestion
from leapalign.errors import UserError
from leapalign.lookup.catalog import listing
from leapalign.lookup.recipes import load_file, read_run


def reward_config(word: str) -> Any:
    """NAME, NAME=PATH, or file.py:name (a function or a dataclass of the user's; the file is executed)."""
    if ".py:" in word:
        return _own(word)
    name, given, path = word.partition("=")
    classes = reward_classes()
    if name not in classes:
        raise UserError(
            f"there is no reward {name!r}{suggestion(name, classes)}; "
            f"use one of {', '.join(classes)}, NAME=PATH, or file.py:name"
        )
    fields = {field.name for field in dataclasses.fields(classes[name])}
    if given and "path" not in fields:
        raise UserError(f"{word}: the reward {name} has no path; give {name} alone")
    if name == "custom":
        raise UserError("custom: give your own function as --reward my_file.py:name")
    return classes[name](path=path) if given else classes[name]()


def is_reward(word: str) -> bool:
    """NAME, NAME=PATH or file.py:name; anything else names a model."""
    return ".py:" in word or word.partition("=")[0] in reward_classes()


def reward_classes() -> dict[str, Any]:
    """name -> configuration class of every published reward."""
    found = {}
    for entry in listing(("rewards",))["rewards"]:
        module, _, cls = entry["type"].rpartition(".")
        found[entry["name"]] = getattr(importlib.import_module(module), cls)
    return found


def rewards_of(source: str, plugins: dict[str, ModuleType]) -> dict[str, Any]:
    """name -> configuration: a run's own rewards; for the embedded model its reward and the held-out judge."""
    from leapalign.rewards.clip import PickScore
    from leapalign.training.engine import reward_names

    path, own = Path(source) / "run.json", {}
    if path.is_file():
        run = read_run(path, plugins)
        own = dict(zip(reward_names(run), (term.reward for term in run.rewards)))
    elif source.startswith("embedded:"):
        own = {"pickscore": PickScore(path="embedded:reward")}
    if any(getattr(reward, "path", "").startswith("embedded:") for reward in own.values()):
        own |= {"held_out_reward": PickScore(path="embedded:judge")}
    return own


def _own(word: str) -> Any:
    from leapalign.rewards.custom import Custom

    file, _, name = word.rpartition(":")
    module = load_file(file)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{word}: there is no {name!r} in the file{suggestion(name, vars(module))}")
    return found() if hasattr(found, "load") else Custom(function=word)

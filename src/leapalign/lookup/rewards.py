"""Resolve a word to a reward, and a model to its rewards."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_origin, get_type_hints

from leapalign.codec import decode, suggestion
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file, read_run
from leapalign.rewards import BUILT_IN
from leapalign.rewards.adapt import described
from leapalign.rewards.base import DescribedReward, Loads, RewardConfig
from leapalign.rewards.custom import Custom
from leapalign.rewards.value_model import ValueModel
from leapalign.storage.embedded import PREFIX


def reward_config(word: str) -> RewardConfig:
    """Return the reward that `word` names. Raises UserError with a suggestion if it names none.

    NAME, NAME=PATH, NAME=PATH,field=value or NAME,field=value (fields of the reward's configuration; numbers,
    true, false and lists as in JSON), or file.py:name (a function or a dataclass of the user's; the file is executed).
    """
    if ".py:" in word:
        return _own(word)
    name, classes = _name_of(word), reward_classes()
    if name not in classes:
        raise UserError(
            f"unknown reward {name!r}{suggestion(name, classes)}; "
            f"use one of {', '.join(classes)}, NAME=PATH, or file.py:name"
        )
    if name == Custom.name:
        raise UserError("custom: give your own function as --reward my_file.py:name")
    if name == ValueModel.name:
        raise UserError("value-model: it learns within a run and scores nothing alone; give the reward that it learns")
    return decode(classes[name], _settings(word, classes[name]), where=word)


def _name_of(word: str) -> str:
    return re.split("[=,]", word, maxsplit=1)[0]


def _settings(word: str, cls: type[DescribedReward]) -> dict[str, Any]:
    """Return the fields that a word sets; a comma in a path separates only if the name of a field and = follow it."""
    fields = [field.name for field in dataclasses.fields(cls)]
    first, *others = re.split(rf",(?=(?:{'|'.join(fields)})=)", word.removeprefix(cls.name))
    if first and ("path" not in fields or not first.startswith("=")):
        expected = f"{cls.name}=PATH,field=value" if "path" in fields else f"{cls.name},field=value"
        raise UserError(f"{word}: expected {expected}; the fields of {cls.name} are {', '.join(fields)}")
    given = {"path": first[1:]} if first else {}
    kinds = get_type_hints(cls)
    return given | {key: _value(kinds[key], text) for key, _, text in (other.partition("=") for other in others)}


def _value(kind: Any, text: str) -> Any:
    """Return the text, or its JSON value if the field is a number, a boolean or a list."""
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text  # which `decode` refuses, naming what it expects


def is_reward(word: str) -> bool:
    """NAME, NAME=PATH or file.py:name; anything else names a model."""
    return ".py:" in word or _name_of(word) in reward_classes()


def reward_classes() -> dict[str, type[DescribedReward]]:
    """Return name -> configuration class of every built-in reward."""
    return {cls.name: cls for cls in BUILT_IN}


def rewards_of(source: str, plugins: dict[str, ModuleType]) -> dict[str, Any]:
    """Return name -> configuration: a run's own rewards, then its held-out ones; for the embedded model its reward.

    With an embedded reward, the embedded judge is among them as `held_out_reward`.
    """
    from leapalign.rewards.clip import PickScore
    from leapalign.training.engine import reward_names
    from leapalign.training.monitors import held_out_names

    path, own, judge = Path(source) / "run.json", {}, PickScore(path="embedded:judge")
    if path.is_file():
        run = read_run(path, plugins)
        terms = (described(term.reward).in_evaluations() for term in run.rewards)
        own = dict(zip(reward_names(run), terms))
        others = zip(held_out_names(run), (term.reward for term in run.monitors.held_out))
        own |= {f"held_out/{name}": reward for name, reward in others if reward != judge}
    elif source.startswith("embedded:"):
        own = {"pickscore": PickScore(path="embedded:reward")}
    sources = [source for reward in own.values() for source in described(reward).sources()]
    if any(source.path.startswith(PREFIX) for source in sources):
        own |= {"held_out_reward": judge}
    return own


def _own(word: str) -> RewardConfig:
    file, _, name = word.rpartition(":")
    module = load_file(file)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{word}: the file defines no {name!r}{suggestion(name, vars(module))}")
    return found() if isinstance(found, type) and isinstance(found, Loads) else Custom(function=word)

"""Inputs of a run besides its settings: prompts, weights and the user's code, identified by content.

    RUN/inputs.json, and in state.json of each checkpoint:
    {"folder": where the run was started, "inputs": {place: {file: identity}}, "derived": {name: value}}

A file that a setting names may be edited, replaced, or missing from another working folder. A resumed run therefore
compares contents (`unchanged.py`) and resolves relative paths from the folder where the run was started (`anchored`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from leapalign.codec import classes_in, field_types
from leapalign.errors import UserError
from leapalign.prompts import Prompt
from leapalign.rewards.custom import Custom, module_of
from leapalign.rewards.value_model import ValueModel
from leapalign.run import Run
from leapalign.storage.embedded import PREFIX, resolve
from leapalign.storage.files import sha256
from leapalign.storage.hub import cached_folder, is_hub_id
from leapalign.storage.identity import content_identity, folder_identity

FILE = "inputs.json"
Inputs = dict[str, dict[str, str]]  # place in run.json -> file -> identity of its content
T = TypeVar("T")


def inputs_of(run: Run, prompts: Sequence[Prompt], recorded: Inputs | None = None) -> Inputs:
    """Return the identities of all inputs on this machine. `recorded`: more files of the user's code to look for.

    Uncached hub ids and paths that do not exist have no entry.
    """
    found = {"prompts": _prompts(prompts)}
    for place, word in _words(run):
        if place != "prompts.path" and (files := _files(word)):
            found[place] = files
    if code := _code(run, (recorded or {}).get("code", {})):
        found["code"] = code
    return found


def _prompts(prompts: Sequence[Prompt]) -> dict[str, str]:
    texts = json.dumps([prompt.text for prompt in prompts]).encode()
    return {f"{len(prompts)} texts in this order": hashlib.sha256(texts).hexdigest()}


def differing(old: Inputs, new: Inputs) -> list[str]:
    """List `place: file changed` for every recorded input that differs."""
    found = []
    for place, files in old.items():
        there = new.get(place)
        if there is None:
            found.append(f"{place}: {_some(sorted(files))} not found")
        elif place == "prompts" and there != files:
            found.append(f"prompts: {_some(list(files))} -> other texts ({_some(list(there))})")
        elif changed := sorted(file for file, identity in files.items() if there.get(file) != identity):
            found.append(f"{place}: {_some(changed)} changed")
    return found


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")


def anchored(run: Run, folder: Path) -> Run:
    """Return the run with relative paths made absolute, if they exist in `folder`."""

    def absolute(word: str) -> str:
        relative = word and not Path(word).is_absolute() and not word.startswith(PREFIX)
        return str(folder / word) if relative and (folder / word).exists() else word

    terms = tuple(replace(term, reward=_with_words(term.reward, absolute)) for term in run.rewards)
    held_out = tuple(replace(term, reward=_with_words(term.reward, absolute)) for term in run.monitors.held_out)
    return replace(
        run,
        monitors=replace(run.monitors, held_out=held_out),
        model=_with_words(run.model, absolute),
        prompts=_with_words(run.prompts, absolute),
        tuning=_with_words(run.tuning, absolute),
        rewards=terms,
    )


def recorded(out: Path) -> dict[str, Any]:
    """Read RUN/inputs.json; empty if there is none. Raises UserError if it is damaged."""
    file = out / FILE
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record["folder"], str) and isinstance(record["inputs"], dict):
            return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{file}: cannot be read as the record of a run's inputs; remove it to skip the comparison")


def base_changes(run: Run, out: Path) -> list[str]:
    """List the model's files that have changed since the finished run was trained."""
    old = {place: files for place, files in recorded(out).get("inputs", {}).items() if place.startswith("model.")}
    return differing(old, {place: files for place, word in _words(run) if (files := _files(word))}) if old else []


def _words(run: Run) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for every text in the plug-ins' settings that may name a file."""
    plugins = [("model", run.model), ("prompts", run.prompts), ("tuning", run.tuning)]
    plugins += [(f"rewards[{i}].reward", term.reward) for i, term in enumerate(run.rewards)]
    plugins += [(f"rewards[{i}].reward.of", reward.of) for i, reward in _value_models(run)]
    held_out = enumerate(run.monitors.held_out)
    plugins += [(f"monitors.held_out[{i}].reward", term.reward) for i, term in held_out]
    for place, config in plugins:
        yield from ((f"{place}.{name}", value) for name, value in _texts(config))


def _value_models(run: Run) -> list[tuple[int, ValueModel]]:
    """List (index, reward) of value models, which learn a reward with settings of its own."""
    return [(i, term.reward) for i, term in enumerate(run.rewards) if isinstance(term.reward, ValueModel)]


def _texts(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the free-text fields; not Literals, and not a negative prompt, even if a file has that name."""
    for name, kind in field_types(type(config)).items():
        if kind is str and not name.endswith("prompt") and (value := getattr(config, name)):
            yield name, value


def _with_words(config: T, change: Callable[[str], str]) -> T:
    changes: dict[str, Any] = {name: new for name, value in _texts(config) if (new := change(value)) != value}
    if isinstance(config, ValueModel) and (learnt := _with_words(config.of, change)) != config.of:
        changes["of"] = learnt
    return replace(config, **changes) if changes else config  # type: ignore[type-var]


def _files(word: str) -> dict[str, str]:
    """Return the identities of files behind a path, an `embedded:NAME` or a cached hub id; empty if there are none."""
    path = Path(resolve(word) if word.startswith(PREFIX) else word)
    try:
        if path.is_file():
            return {path.name: content_identity(path)}
        if not path.is_dir():
            cached = cached_folder(word) if is_hub_id(word) else None
            if cached is None:
                return {}
            path = cached
        return folder_identity(path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _code(run: Run, recorded: dict[str, str]) -> dict[str, str]:
    """Return the user's files and the modules beside them, if they are imported or recorded."""
    files = {Path(inspect.getfile(cls)) for cls in classes_in(run).values() if not _is_ours(cls.__module__)}
    rewards = [term.reward for term in (*run.rewards, *run.monitors.held_out)]
    for reward in (*rewards, *(reward.of for _, reward in _value_models(run))):
        if isinstance(reward, Custom):
            files.add(Path(str(module_of(reward.function).__file__)))
    found: dict[str, str] = {}
    for file in sorted(file.resolve() for file in files):
        beside = {file.parent / name for name in recorded}
        beside |= {path for path in map(_source, list(sys.modules.values())) if path and path.parent == file.parent}
        mine = {file} | {path for path in beside if path.is_file() and not _is_user_file(path)}
        found |= {path.name: sha256(path) for path in sorted(mine)}
    return found


def _is_ours(module: str) -> bool:
    return module.startswith("leapalign.")


def _is_user_file(path: Path) -> bool:
    """Return True for a user's file given on the command line, which counts only if its classes are used."""
    own = (module for name, module in list(sys.modules.items()) if name.startswith("leapalign_user_"))
    return any(_source(module) == path for module in own)


def _source(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None

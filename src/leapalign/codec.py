"""Dataclasses to JSON and back, strictly: what run.json holds replays the run, and a typo in it is an error.

Each plug-in names its class: {"type": "leapalign.methods.leapalign.LeapAlign", ...}. Reading imports nothing but
modules of leapalign, each in its own folder. A class of the user's own file is recorded as "my_recipe.py:MyReward" and
is found only when the user gives that file again: a run.json never runs code by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from leapalign.errors import UserError

Plugins = Mapping[str, types.ModuleType]  # the user's own files, by file name
FOLDERS = {  # of plug-in fields
    "model": "models",
    "method": "methods",
    "reward": "rewards",
    "prompts": "prompts",
    "tuning": "tuning",
}


def encode(value: Any) -> Any:
    """A dataclass as JSON values, each dataclass with the "type" that `decode` needs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type_name(type(value))} | pairs
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(f"{value!r} cannot be written to run.json; use finite numbers, texts and dataclasses")


def type_name(cls: type) -> str:
    if cls.__module__.startswith("leapalign."):
        return f"{cls.__module__}.{cls.__qualname__}"
    return f"{Path(inspect.getfile(cls)).name}:{cls.__qualname__}"


def dumps(value: Any) -> str:
    return json.dumps(encode(value), indent=2, allow_nan=False) + "\n"


def loads(text: str, annotation: type, *, plugins: Plugins | None = None, where: str = "run.json") -> Any:
    """Strict JSON text to a value of `annotation`; UserError says where and what is wrong."""

    def constant(name: str) -> None:
        raise UserError(f"{where}: {name} is not JSON; use a finite number")

    try:
        record = json.loads(text, object_pairs_hook=lambda pairs: _no_twins(pairs, where), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    return decode(annotation, record, plugins=plugins, where=where)


def decode(annotation: Any, value: Any, *, plugins: Plugins | None = None, where: str = "run.json") -> Any:
    """JSON values to `annotation`: a dataclass, a plain type, Literal, tuple, list, dict or a union of them."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return _decode_plugin(value, plugins or {}, where)
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(annotation, value, plugins or {}, where)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, plugins, where)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise UserError(f"{where}: {value!r} is not one of {_listed(args)}{suggestion(value, args)}")
        return value
    if origin in (tuple, list):
        return _decode_sequence(origin, args, value, plugins, where)
    if origin is dict:
        _expect(dict, value, where)
        return {key: decode(args[1], item, plugins=plugins, where=_inside(where, key)) for key, item in value.items()}
    return _decode_plain(annotation, value, where)


def suggestion(word: Any, choices: Iterable[Any]) -> str:
    """'; did you mean x?' where one of the choices is close, else nothing."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _decode_plain(annotation: Any, value: Any, where: str) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, where)
    if annotation is Path:
        return Path(_expect(str, value, where))
    _expect(annotation, value, where)
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: {_short(value)} has a NUL character; leave it out")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not finite")
    return value


def _as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{where}: the number is too large") from None


def _decode_sequence(origin: type, args: tuple[Any, ...], value: Any, plugins: Plugins | None, where: str) -> Any:
    _expect(list, value, where)
    endless = origin is list or args[-1] is Ellipsis
    if not endless and len(args) != len(value):
        raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
    kinds = [args[0]] * len(value) if endless else args
    items = enumerate(zip(kinds, value))
    return origin(decode(kind, item, plugins=plugins, where=f"{where}[{i}]") for i, (kind, item) in items)


def _decode_union(args: tuple[Any, ...], value: Any, plugins: Plugins | None, where: str) -> Any:
    problems = []
    for kind in args:
        try:
            return decode(kind, value, plugins=plugins, where=where)
        except UserError as error:
            problems.append(str(error))
    raise UserError(problems[0])


def _decode_plugin(value: Any, plugins: Plugins, where: str) -> Any:
    _expect(dict, value, where)
    name = value.get("type")
    if not isinstance(name, str):
        raise UserError(f'{where}: it must name its class, as in "type": "leapalign.methods.leapalign.LeapAlign"')
    return _decode_dataclass(_find_class(name, plugins, where), value, plugins, where)


def _find_class(name: str, plugins: Plugins, where: str) -> type:
    if ":" in name:
        file, _, attribute = name.partition(":")
        if file not in plugins:
            raise UserError(f"{where}: {name} is a class of your own file; give it with --plugin path/to/{file}")
        module = plugins[file]
    else:
        module, attribute = _own_module(name, where)
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or cls.__module__ != module.__name__:
        choices = [key for key, item in vars(module).items() if dataclasses.is_dataclass(item)]
        raise UserError(f"{where}: there is no configuration class {name}{suggestion(attribute, choices)}")
    return cls


def _own_module(name: str, where: str) -> tuple[types.ModuleType, str]:
    """Only a module of the folder that the field belongs to: a file must not choose what is imported."""
    module_name, _, attribute = name.rpartition(".")
    folder = FOLDERS.get(re.split(r"[. ]", where)[-1], "?")
    home = f"leapalign.{folder}"
    if module_name != home and not module_name.startswith(home + "."):
        raise UserError(f"{where}: {name} is not a class of {home}; see `leapalign list`")
    try:
        return importlib.import_module(module_name), attribute
    except ModuleNotFoundError:
        raise UserError(f"{where}: there is no module {module_name}; see `leapalign list`") from None


def _decode_dataclass(cls: Any, value: Any, plugins: Plugins, where: str) -> Any:
    _expect(dict, value, where)
    named = value.get("type", type_name(cls))
    if named != type_name(cls):
        raise UserError(f"{where}: expected type {type_name(cls)}, got {named!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in value.keys() - {"type"}:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{suggestion(key, known)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.init and _is_required(f)]
    if missing := [key for key in needed if key not in value]:
        raise UserError(f"{where}: missing {_listed(missing)}")
    items = {k: decode(hints[k], v, plugins=plugins, where=_inside(where, k)) for k, v in value.items() if k != "type"}
    return _construct(cls, items, where)


def _inside(where: str, key: str) -> str:
    """run.json: model.path"""
    return f"{where}: {key}" if where.endswith(".json") else f"{where}.{key}"


def _construct(cls: Any, items: dict[str, Any], where: str) -> Any:
    try:
        return cls(**items)
    except (UserError, ValueError) as error:  # a plug-in checks its own values
        raise UserError(f"{where}: {error}") from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind and not (kind is types.NoneType and value is None):
        raise UserError(f"{where}: expected {_kind(kind)}, got {_kind(type(value))} {_short(value)}")
    return value


def _kind(kind: Any) -> str:
    words = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return (words | {bool: "true or false", types.NoneType: "null"}).get(kind, str(kind))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(repr(item) for item in items)


def _no_twins(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where}: the key {twin!r} stands there twice")
    return record

"""Convert JSON values to dataclasses, checking each against its annotation.

`decode` also accepts dataclass instances for JSON objects and tuples for lists, so that values built in Python pass the
same checks as a file (`check_fields`), and 1 becomes 1.0 in a float field.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from leapalign.codec.messages import (
    KINDS,
    Where,
    call_of,
    described,
    how_to_call,
    kind_word,
    listed,
    required,
    short,
    suggestion,
)
from leapalign.codec.writing import type_name
from leapalign.errors import UserError

Plugins = Mapping[str, types.ModuleType]  # the user's own files, by file name


@runtime_checkable
class RenamesFields(Protocol):
    """A dataclass, or its class, some of whose fields once had other names."""

    renamed_fields: ClassVar[Mapping[str, str]]  # former name -> name


@dataclass(frozen=True, kw_only=True)
class Known:
    """Classes that a name may refer to besides those of this package."""

    plugins: Plugins = field(default_factory=dict)
    classes: Mapping[str, type] = field(default_factory=dict)


def loads(text: str, annotation: type, *, plugins: Plugins | None = None, where: str = "run.json") -> Any:
    """Parse strict JSON text to a value of `annotation`. Raises UserError with place and cause."""

    def constant(name: str) -> None:
        raise UserError(f"{where}: {name} is not JSON; use a finite number")

    try:
        record = json.loads(text, object_pairs_hook=lambda pairs: _no_twins(pairs, where), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    return decode(annotation, record, plugins=plugins, where=where)


def decode(
    annotation: Any,
    value: Any,
    *,
    plugins: Plugins | None = None,
    classes: Mapping[str, type] | None = None,
    where: str = "run.json",
) -> Any:
    """Convert JSON values to `annotation`: a dataclass, plain type, Literal, tuple, list, dict or a union of them.

    `plugins` and `classes`: the user's files and classes that a "type" may name. Raises UserError with the field.
    """
    return _decode(annotation, value, Known(plugins=plugins or {}, classes=classes or {}), Where(where))


def check_fields(instance: Any) -> None:
    """Check a new dataclass instance against its annotations: for `__post_init__`, before values are compared.

    Fields get the type that they have after reading: 1 becomes 1.0, a list a tuple. Raises UserError with field, value
    and expected type.
    """
    hints = field_types(type(instance))
    for each in dataclasses.fields(instance):
        value = _decode(hints[each.name], getattr(instance, each.name), Known(), Where("", each.name))
        object.__setattr__(instance, each.name, value)


def _decode(annotation: Any, value: Any, known: Known, where: Where) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return _decode_plugin(value, known, where)
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(annotation, value, known, where)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, known, where)
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            raise UserError(f"{where}: {value!r} is not one of {listed(args)}{suggestion(value, args)}")
        return value
    if origin in (tuple, list):
        return _decode_sequence(origin, args, value, known, where)
    if origin is dict:
        _expect(dict, value, where)
        return {_expect(str, k, where): _decode(args[1], item, known, where.key(k)) for k, item in value.items()}
    return _decode_plain(annotation, value, where)


def _decode_plain(annotation: Any, value: Any, where: Where) -> Any:
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = _as_float(value, where)
    if annotation is Path:
        return value if isinstance(value, Path) else Path(_expect(str, value, where))
    _expect(annotation, value, where)
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: {short(value)} contains a NUL character; remove it")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not finite")
    return value


def _as_float(value: float, where: Where) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{where}: the number is too large") from None


def _decode_sequence(origin: type, args: tuple[Any, ...], value: Any, known: Known, where: Where) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: expected a list, got {described(value)}{_as_list(args[0], value)}")
    endless = origin is list or args[-1] is Ellipsis
    if not endless and len(args) != len(value):
        raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
    kinds = [args[0]] * len(value) if endless else args
    return origin(_decode(kind, item, known, where.item(i)) for i, (kind, item) in enumerate(zip(kinds, value)))


def _decode_union(args: tuple[Any, ...], value: Any, known: Known, where: Where) -> Any:
    problems = []
    for kind in args:
        try:
            return _decode(kind, value, known, where)
        except UserError as error:
            problems.append(str(error))
    raise UserError(problems[0])


def _decode_plugin(value: Any, known: Known, where: Where) -> Any:
    if _is_instance(value):
        _check_home(type(value), where)
        return _decode_dataclass(type(value), value, known, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a configuration{where.kind_of}, got {described(value)}{how_to_call(value)}")
    name = value.get("type")
    if not isinstance(name, str):
        raise UserError(f'{where}: it must name its class, as in "type": "leapalign.methods.leapalign.LeapAlign"')
    cls = known.classes.get(name) or _find_class(name, known.plugins, where)
    _check_home(cls, where)
    return _decode_dataclass(cls, value, known, where)


def _find_class(name: str, plugins: Plugins, where: Where) -> type:
    if ":" in name:
        file, _, attribute = name.partition(":")
        if file not in plugins:
            raise UserError(f"{where}: {name} is a class of your own file; give it with --plugin path/to/{file}")
        module = plugins[file]
    else:
        module_name, _, attribute = name.rpartition(".")
        _check_folder(module_name, name, where)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            raise UserError(f"{where}: no module is named {module_name}; see `leapalign list`") from None
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or cls.__module__ != module.__name__:
        choices = [key for key, item in vars(module).items() if dataclasses.is_dataclass(item)]
        raise UserError(f"{where}: unknown configuration class {name}{suggestion(attribute, choices)}")
    return cls


def _check_home(cls: type, where: Where) -> None:
    """Raise UserError for a built-in class of another folder, or a user-defined one without the needed methods."""
    if cls.__module__.startswith("leapalign."):
        _check_folder(cls.__module__, f"{cls.__module__}.{cls.__qualname__}", where)
        return
    if where.kind is None:
        return
    kind = where.kind
    second = bool(kind.instead) and all(callable(getattr(cls, name, None)) for name in kind.instead)
    for method, number in (kind.instead if second else kind.calls).items():
        function = getattr(cls, method, None)
        if not callable(function) or not _takes(function, 1 + number):
            raise UserError(
                f"{where}: {type_name(cls)} has no {method}() that takes {number} arguments; "
                f"see how to write your own in docs/{where.kind.folder}.md"
            )


def _check_folder(module: str, name: str, where: Where) -> None:
    """Raise UserError for a module outside the field's folder: a file must not choose what is imported."""
    kinds = [where.kind] if where.kind else KINDS.values()
    homes = [f"leapalign.{kind.folder}" for kind in kinds]
    inside = [*homes, *(f"leapalign.{folder}" for kind in kinds for folder in kind.also)]
    if not any(module == home or module.startswith(home + ".") for home in inside):
        raise UserError(f"{where}: {name} is not a class of {' or '.join(homes)}; see `leapalign list`")


def _decode_dataclass(cls: Any, value: Any, known: Known, where: Where) -> Any:
    if type(value) is cls:
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(cls) if f.init}
    elif not isinstance(value, dict):
        raise UserError(f"{where}: expected {call_of(cls)}, got {described(value)}{how_to_call(value)}")
    named = value.get("type", type_name(cls))
    if named != type_name(cls):
        raise UserError(f"{where}: expected type {type_name(cls)}, got {named!r}")
    value = with_new_names(value, _renamed(cls))
    hints = field_types(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in value.keys() - {"type"}:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{suggestion(key, names)}")
    if missing := [key for key in required(cls) if key not in value]:
        raise UserError(f"{where}: missing {listed(missing)}")
    items = {k: _decode(hints[k], v, known, where.key(k)) for k, v in value.items() if k != "type"}
    return _construct(cls, items, where)


def _construct(cls: Any, items: dict[str, Any], where: Where) -> Any:
    try:
        return cls(**items)
    except (UserError, ValueError, TypeError) as error:  # raised by a plug-in's own checks
        raise UserError(f"{where}: {error}") from None


def _renamed(cls: Any) -> Mapping[str, str]:
    return cls.renamed_fields if isinstance(cls, RenamesFields) else {}


def with_new_names(values: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Rename former field names to new ones. `renamed`: former -> new."""
    return {renamed.get(name, name): value for name, value in values.items()}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return field name -> type. Raises UserError for an annotation that cannot be resolved at runtime."""
    try:
        return get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise UserError(f"{type_name(cls)}: a field's annotation cannot be resolved at runtime ({error})") from None


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _takes(function: Callable[..., Any], number: int) -> bool:
    """Return True if a function accepts `number` positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * number)
    except (TypeError, ValueError):
        return False
    return True


def _as_list(kind: Any, value: Any) -> str:
    """Explain how to write a tuple, if a single element was given in its place."""
    return f"; write ({type(value).__name__}(...),)" if isinstance(kind, type) and type(value) is kind else ""


def _expect(kind: Any, value: Any, where: Where) -> Any:
    if type(value) is not kind and not (kind is types.NoneType and value is None):
        raise UserError(f"{where}: expected {kind_word(kind)}, got {described(value)}{how_to_call(value)}")
    return value


def _no_twins(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where}: the key {twin!r} appears twice; keep one")
    return record

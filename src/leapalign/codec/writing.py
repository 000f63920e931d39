"""Convert dataclasses to JSON values."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

from leapalign.codec.messages import Where
from leapalign.errors import UserError


def encode(value: Any) -> Any:
    """Convert a dataclass to JSON values, each dataclass with the "type" that `decode` needs."""
    return _encode(value, Where(""))


def _encode(value: Any, where: Where) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: _encode(getattr(value, f.name), where.key(f.name)) for f in dataclasses.fields(value)}
        return {"type": type_name(type(value))} | pairs
    if isinstance(value, (tuple, list)):
        return [_encode(item, where.item(i)) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _encode(item, where.key(str(key))) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(f"{where}: {value!r} cannot be written to run.json; use finite numbers, strings and dataclasses")


def type_name(cls: type) -> str:
    """Return the class name for run.json. Raises UserError for a class that no file defines."""
    if cls.__module__.startswith("leapalign."):
        return f"{cls.__module__}.{cls.__qualname__}"
    try:
        return f"{Path(inspect.getfile(cls)).name}:{cls.__qualname__}"
    except (TypeError, OSError):
        raise UserError(f"the class {cls.__qualname__} is not defined in a file; put it into a .py file") from None


def dumps(value: Any) -> str:
    return json.dumps(encode(value), indent=2, allow_nan=False) + "\n"


def classes_in(value: Any) -> dict[str, type]:
    """Return all classes of dataclass instances inside a value, by their names in run.json."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return {type_name(type(value)): type(value)} | classes_in(inner)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {name: cls for item in items for name, cls in classes_in(item).items()}

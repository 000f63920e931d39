"""Which configuration opens which diffusers pipeline: found in this folder's files, so that a new family is known."""

from __future__ import annotations

import importlib
from typing import Any

from leapalign.errors import UserError


def families() -> dict[str, Any]:
    """diffusers' pipeline class -> our configuration class, of every file in models/."""
    from leapalign.lookup.catalog import listing

    found = {}
    for entry in listing(("models",))["models"]:
        module, _, cls = entry["type"].rpartition(".")
        config = getattr(importlib.import_module(module), cls)
        found[config.pipeline] = config
    return found


def config_for(source: str) -> Any:
    """The configuration, at its usual settings, of a pipeline folder, a hub id (then fetched) or `embedded:NAME`."""
    from leapalign.storage.pipeline_folder import INDEX, locate, read_json

    index, known = read_json(locate(source) / INDEX), families()
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{source}: it holds a {name}; expected one of {', '.join(sorted(known))}")
    return known[name](path=source)

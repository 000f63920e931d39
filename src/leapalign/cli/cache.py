"""`leapalign cache`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from leapalign.cli.answer import answer
from leapalign.models.prompt_embeds.location import entries, gigabytes, limit, place


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """Show or clear the prompt embeds on disk (LEAPALIGN_CACHE, LEAPALIGN_CACHE_GB)."""

    clear: bool = False
    """Remove all entries; the next run encodes its prompts again."""
    json: bool = False
    """Print JSON on stdout."""


def cache_command(argv: list[str]) -> None:
    flags = tyro.cli(CacheFlags, args=argv, prog="leapalign cache")
    found = show_cache(clear=flags.clear)
    answer(found, flags.json, as_text(found))


def show_cache(*, clear: bool) -> dict[str, Any]:
    """Return {"place", "limit", "bytes", "cleared", "models"}: the content of the cache (before it is cleared)."""
    root = place()
    models = [_model(folder) for folder in sorted(root.glob("*")) if (folder / "key.json").is_file()]
    total = sum(model["bytes"] for model in models)
    if clear:
        _clear(root)
    return {"place": str(root), "limit": limit(), "bytes": total, "cleared": clear, "models": models}


def as_text(answer: dict[str, Any]) -> str:
    """Format one line for the cache and one for each model in it."""
    lines = [f"{answer['place']}: {gigabytes(answer['bytes'])} of at most {gigabytes(answer['limit'])}"]
    for model in answer["models"]:
        settings = ", ".join(f"{name} {value}" for name, value in model["settings"].items())
        lines.append(f"  {model['prompts']:>7} prompts  {gigabytes(model['bytes']):>9}  {model['model']}  ({settings})")
    return "\n".join([*lines, *(["removed"] if answer["cleared"] else [])])


def _model(folder: Path) -> dict[str, Any]:
    try:
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    except ValueError:
        key = {}
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return {
        "model": key.get("model", folder.name),
        "settings": key.get("settings", {}),
        "prompts": len(sizes),
        "bytes": sum(sizes),
    }


def _clear(root: Path) -> None:
    """Remove files that the cache wrote and no others: the user may have chosen a folder with other things in it."""
    for file in [*entries(root)]:
        file.unlink(missing_ok=True)
    for folder in [folder for folder in root.glob("*") if (folder / "key.json").is_file()]:
        shutil.rmtree(folder)
    shutil.rmtree(root / "hashes", ignore_errors=True)

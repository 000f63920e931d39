"""`leapalign cache`: what the prompt cache on disk holds, and how to empty it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from leapalign.models.prompt_embeds.location import entries, gigabytes, limit, place


def show(*, clear: bool) -> dict[str, Any]:
    """{"place", "limit", "bytes", "models"}: what is there, or what was there before it was cleared."""
    root = place()
    models = [_model(folder) for folder in sorted(root.glob("*")) if (folder / "key.json").is_file()]
    total = sum(model["bytes"] for model in models)
    if clear:
        _clear(root)
    return {"place": str(root), "limit": limit(), "bytes": total, "cleared": clear, "models": models}


def as_text(answer: dict[str, Any]) -> str:
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
    """Only what the cache has written: the place may be a folder with other things in it."""
    for file in [*entries(root)]:
        file.unlink(missing_ok=True)
    for folder in [folder for folder in root.glob("*") if (folder / "key.json").is_file()]:
        shutil.rmtree(folder)
    shutil.rmtree(root / "hashes", ignore_errors=True)

"""Resolve a word to prompts: a file, or the test prompts of a set."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from leapalign.codec import suggestion
from leapalign.errors import UserError
from leapalign.lookup.catalog import plugins
from leapalign.prompts import PromptFile, Prompts, ShapeWorldPrompts


def prompts_of(word: str, per_task: int) -> Prompts:
    """Open a prompt file, or the test prompts of NAME (`leapalign list prompts`) or NAME=PATH, a copy on disk.

    `per_task` is the number of ShapeWorld prompts of each task. Raises UserError for any other word.
    """
    name, given, path = word.partition("=")
    known = _prompt_sets()
    if name not in known:
        if not os.path.exists(word) and (given or not Path(word).suffix):
            raise UserError(
                f"--prompts {word}: unknown prompt set {name!r}{suggestion(name, known)}; give one of "
                f"{', '.join(known)}, or a .txt, .jsonl or .csv file"
            )
        return PromptFile(path=word)
    takes = {field.name for field in fields(known[name])}
    if given and ("path" not in takes or not path):
        raise UserError(f"--prompts {word}: " + (f"{name} takes no path" if path else "a path is missing"))
    settings = {"split": "test", "path": path} | ({"num": per_task} if name == ShapeWorldPrompts.name else {})
    return known[name](**{key: value for key, value in settings.items() if key in takes})


def _prompt_sets() -> dict[str, Any]:
    """Return name -> configuration class of every source of prompts except files."""
    return {cls.name: cls for cls in plugins("prompts") if cls is not PromptFile}

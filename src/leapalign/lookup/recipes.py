"""Resolve RECIPE to a Run: a recipe's name, `file.py:name` (the file is executed), or a run.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from leapalign.checkpoint.inputs import anchored, recorded
from leapalign.codec import loads, suggestion
from leapalign.errors import UserError
from leapalign.lookup.user_files import load_file, load_plugins, refuse_twin, value_in
from leapalign.run import Run


def load_recipe(word: str, plugins: dict[str, ModuleType]) -> Run:
    """Return the run that RECIPE names. Raises UserError with a suggestion if there is none."""
    if word.endswith(".json"):
        return read_run(Path(word), plugins)
    if ".py:" in word:
        file, _, name = word.rpartition(":")
        refuse_twin(file, plugins)
        return value_in(load_file(file), name, word, Run, "a recipe is a function that returns a leapalign Run")
    from leapalign.recipes import RECIPES

    if word not in RECIPES:
        raise UserError(
            f"unknown recipe {word!r}{suggestion(word, RECIPES)}\n"
            f"RECIPE is one of {', '.join(RECIPES)}, or file.py:name, or a run.json"
        )
    return RECIPES[word]()


def read_run(path: Path, plugins: dict[str, ModuleType]) -> Run:
    """Read a run.json strictly; relative paths are relative to the folder in which the run was started, if recorded."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the run ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so this is not a run.json") from None
    run, folder = loads(text, Run, plugins=plugins, where=str(path)), recorded(path.parent).get("folder", "")
    return run if folder in ("", os.getcwd()) else anchored(run, Path(folder))


def plugins_in(argv: Sequence[str]) -> dict[str, ModuleType]:
    """Load the files after `--plugin` before other flags are parsed, because a run.json may need them."""
    if "--plugin" not in argv:
        return {}
    after = argv[list(argv).index("--plugin") + 1 :]
    end = next((i for i, word in enumerate(after) if word.startswith("-")), len(after))
    return load_plugins(after[:end])

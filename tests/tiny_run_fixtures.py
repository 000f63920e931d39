"""The tiny run of tiny_recipe.py, in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leapalign.lookup.recipes import load_file
from leapalign.run import Run

RECIPE = Path(__file__).parent / "training" / "tiny_recipe.py"
TINY = load_file(str(RECIPE))


@pytest.fixture
def recipe_file() -> Path:
    return RECIPE


@pytest.fixture
def tiny_module() -> Any:
    return TINY


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Run]:
    """tiny_run(steps=6) -> the tiny recipe with other numbers, writing into tmp_path/run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TINY.PROMPTS))
    run = TINY.tiny()
    return lambda **changes: replace(
        run, **({"out": str(tmp_path / "run"), "prompts": replace(run.prompts, path=str(prompts))} | changes)
    )

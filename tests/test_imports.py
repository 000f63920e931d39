"""Every import points down: no circle of files, `cli` imported by `__main__` alone, and pyproject.toml's contracts.

grimp reads the files and runs nothing, so imports inside functions and imports for the type checker count too.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules it imports. A package's own name stands for its `__init__.py`."""
    graph = grimp.build_graph("leapalign", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_circle_of_files():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail("imports run in a circle: " + " <- ".join(error.args[1]))


def test_nothing_but_main_imports_cli():
    importers = {importer for importer, imported in imports().items() if any(map(is_cli, imported))}
    assert {importer for importer in importers if not is_cli(importer)} == {"leapalign.__main__"}


def is_cli(module: str) -> bool:
    return module == "leapalign.cli" or module.startswith("leapalign.cli.")


def test_contracts_of_pyproject():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

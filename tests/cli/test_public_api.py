"""`from leapalign import ...`: lazy at runtime, known to type checkers, and enough for the examples."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import leapalign

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_slow():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'tyro'}"
    code = f"import leapalign, sys; assert not {heavy} & sys.modules.keys()"
    more = f"from leapalign import LeapAlign, LoRA, PickScore, PromptFile, Run, SD3; {code}"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", more], check=True)


@pytest.mark.parametrize("name", leapalign.__all__)
def test_every_public_name_is_there(name):
    assert getattr(leapalign, name) is not None and name in dir(leapalign)


def test_any_other_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LeapAling'"):
        leapalign.LeapAling  # noqa: B018
    assert leapalign.__version__ == version("leapalign")


def test_what_type_checkers_see_is_what_comes():
    """The imports under TYPE_CHECKING name the same things from the same modules."""
    tree = ast.parse(Path(leapalign.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and node.col_offset]
    seen = {alias.name: node.module for node in imports for alias in node.names if node.module.startswith("leapalign.")}
    assert seen == {name: f"leapalign.{module}" for name, module in leapalign._HOMES.items()}
    assert sorted(leapalign.__all__) == sorted([*seen, "__version__"])


@pytest.mark.parametrize("file", ["README.md", "examples/library.py", "examples/own_reward.py"])
def test_examples_import_from_one_place(file):
    text = (ROOT / file).read_text()
    code = text if file.endswith(".py") else "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    assert not re.findall(r"^from leapalign\.", code, flags=re.M)
    for names in re.findall(r"^from leapalign import \(?([^)]*?)\)?$", code, flags=re.M):
        assert {name.strip() for name in names.split(",") if name.strip()} <= set(leapalign.__all__)

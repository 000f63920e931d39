"""A user's own file with modules beside it, and files of one name."""

from __future__ import annotations

import pytest

from leapalign.errors import UserError
from leapalign.lookup.recipes import load_recipe
from leapalign.lookup.user_files import load_file, load_plugins
from leapalign.rewards.custom import Custom


def written(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_file_imports_the_module_beside_it_from_any_working_folder(tmp_path, monkeypatch):
    written(tmp_path / "a", helpers_here="def red(x): return x[:, 0]\n", my="from helpers_here import red\n")
    monkeypatch.chdir("/")
    assert load_file(str(tmp_path / "a" / "my.py")).red.__module__ == "helpers_here"


def test_two_files_of_one_name_are_refused_in_one_command(tmp_path):
    a, b = (written(tmp_path / name, my=f"NAME = '{name}'\n") / "my.py" for name in "ab")
    with pytest.raises(UserError, match=r"(a/my.py and .*b/my.py|b/my.py and .*a/my.py) have the same name"):
        load_plugins([str(a), str(b)])
    plugins = load_plugins([str(a), str(a)])
    with pytest.raises(UserError, match="have the same name"):
        load_recipe(f"{b}:run", plugins)


def test_functions_of_two_files_of_one_name_stay_apart(tmp_path):
    one = "def score(images): return images.mean((1, 2, 3))\n"
    a, b = (written(tmp_path / name, same=one + f"# {name}\n") / "same.py" for name in "ab")
    modules = {load_file(str(file)).score: file for file in (a, b)}
    for function, file in modules.items():
        assert Custom(function=f"{file}:score").load().function is function
    with pytest.raises(UserError, match=r"may mean any of .*rename all but one"):
        Custom(function="elsewhere/same.py:score").load()


def test_modules_of_one_name_beside_two_files_are_refused(tmp_path):
    a = written(tmp_path / "a", twin_helper="X = 1\n", first="import twin_helper\n")
    b = written(tmp_path / "b", twin_helper="X = 2\n", second="import twin_helper\n")
    load_file(str(a / "first.py"))
    with pytest.raises(UserError, match=r"b/twin_helper.py and .*a/twin_helper.py have the same name"):
        load_file(str(b / "second.py"))


def test_a_folder_that_hides_a_library_hides_it_no_longer_than_the_import(tmp_path):
    import sys

    written(tmp_path / "c", my="X = 1\n", tabnanny="raise SystemExit\n")
    load_file(str(tmp_path / "c" / "my.py"))
    assert sys.path[0] != str(tmp_path / "c") and sys.path[-1] == str(tmp_path / "c")
    sys.modules.pop("tabnanny", None)
    import tabnanny  # noqa: F401

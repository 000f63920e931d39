"""A user's own Python file: executed once it is given on the command line, and its errors told in one sentence."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from types import FrameType, ModuleType
from typing import Any, TypeVar

from leapalign.codec import check_fields
from leapalign.errors import UserError

T = TypeVar("T")


def load_plugins(files: Sequence[str]) -> dict[str, ModuleType]:
    """File name -> module."""
    return {Path(file).name: load_file(file) for file in files}


def load_file(file: str) -> ModuleType:
    """Execute a user's Python file as a module named like the file. UserError for whatever it raises."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: there is no such file")
    name = f"leapalign_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: this is not a Python file")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        run_user_code(lambda: loader.exec_module(module), file, path)
    except UserError:
        del sys.modules[name]
        raise
    return module


def run_user_code(function: Callable[[], T], word: str, file: Path) -> T:
    """The function's value; `word` is what the user typed, `file` where the code stands.

    Whatever the code raises becomes a UserError with the line of the user's file.
    """
    try:
        return function()
    except SyntaxError as error:
        place = f"{word}, line {error.lineno}" if _same(error.filename, file) else f"{error.filename}, {error.lineno}"
        raise UserError(f"{place}: {error.msg}") from error
    except Exception as error:  # it is the user's code: what it raises is for its author
        line = _line_in(error, file)
        place = f"{word}, line {line}" if line else word
        raise UserError(f"{place}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The message; of a class that compares values of a wrong type, the field that has one."""
    if isinstance(error, UserError):
        return str(error)
    for frame in reversed(list(_frames(error))):
        if frame.f_code.co_name == "__post_init__" and (problem := _wrong_field(frame.f_locals.get("self"))):
            return problem
    return f"{type(error).__name__}: {error}"


def _wrong_field(instance: Any) -> str:
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        return ""
    try:
        check_fields(instance)
    except UserError as error:
        return f"{type(instance).__name__}: {error}"
    return ""


def _line_in(error: Exception, file: Path) -> int:
    """The innermost line of the file that the error passed; 0 = none."""
    passed = [line for frame, line in walk_tb(error.__traceback__) if _same(frame.f_code.co_filename, file)]
    return passed[-1] if passed else 0


def _frames(error: Exception) -> Iterator[FrameType]:
    return (frame for frame, _ in walk_tb(error.__traceback__))


def _same(name: str | None, file: Path) -> bool:
    return name is not None and Path(name).absolute() == file.absolute()

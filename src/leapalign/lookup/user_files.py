"""Execute Python files that the user gives on the command line, and report their errors in one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType, ModuleType
from typing import Any, TypeVar

from leapalign.codec import check_fields, suggestion
from leapalign.errors import UserError

PREFIX = "leapalign_user_"  # prefix of module names
T = TypeVar("T")


def load_plugins(files: Sequence[str]) -> dict[str, ModuleType]:
    """Load files; return file name -> module. Raises UserError for equal names, by which run.json names classes."""
    modules: dict[str, ModuleType] = {}
    for file in files:
        refuse_twin(file, modules)
        modules[Path(file).name] = load_file(file)
    return modules


def refuse_twin(file: str, modules: Mapping[str, ModuleType]) -> None:
    """Raise UserError if another file of the same name is loaded."""
    other = modules.get(Path(file).name)
    if other is not None and Path(str(other.__file__)).resolve() != Path(file).resolve():
        raise UserError(f"{file} and {other.__file__} have the same name, by which run.json refers to them; rename one")


def load_file(file: str) -> ModuleType:
    """Execute a user's Python file as a module of its own. Raises UserError for any error in it.

    Modules beside the file can be imported: before installed ones while it is executed, after them later.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: file not found")
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: this is not a Python file")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        with _importing_from(path.resolve().parent):
            run_user_code(lambda: loader.exec_module(module), file, path)
    except UserError:
        del sys.modules[name]
        raise
    _refuse_foreign_helpers(path, module)
    return module


def module_name(path: Path) -> str:
    """Return a module name that differs for files of one name in two folders."""
    return f"{PREFIX}{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Put the folder first on sys.path; on exit last, where imports inside functions find it and it hides nothing."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _refuse_foreign_helpers(path: Path, module: ModuleType) -> None:
    """Raise UserError if a module beside the file has the name of an imported one beside another user file."""
    others = {p.parent for name, m in list(sys.modules.items()) if name.startswith(PREFIX) and (p := _source(m))}
    folder = path.resolve().parent
    for name, loaded in list(sys.modules.items()):
        source, beside = _source(loaded), folder / f"{name}.py"
        foreign = source is not None and source.parent in others - {folder} and not name.startswith(PREFIX)
        if foreign and beside.is_file():
            del sys.modules[module.__name__]
            raise UserError(f"{beside} and {source} have the same name, so Python would import only one; rename one")


def _source(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def run_user_code(function: Callable[[], T], word: str, file: Path) -> T:
    """Call the function and return its value; `word` is the user's text, `file` contains the code.

    Any error of the code becomes a UserError with the line of the user's file.
    """
    try:
        return function()
    except SyntaxError as error:
        place = f"{word}, line {error.lineno}" if _same(error.filename, file) else f"{error.filename}, {error.lineno}"
        raise UserError(f"{place}: {error.msg}") from error
    except Exception as error:  # the user's code may raise anything
        line = _line_in(error, file)
        place = f"{word}, line {line}" if line else word
        raise UserError(f"{place}: {_said(error)}") from error


def value_in(module: ModuleType, name: str, word: str, kind: type[T], expected: str) -> T:
    """Return the module's `name`, called if it is a function. Raises UserError unless it is a `kind`.

    `word` is the user's text FILE:NAME; `expected` says what it should name.
    """
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{word}: the file defines no {name!r}{suggestion(name, vars(module))}")
    value = run_user_code(found, word, Path(str(module.__file__))) if callable(found) else found
    if type(value) is not kind:
        raise UserError(f"{word}: {name} is a {type(value).__name__}; {expected}")
    return value


def _said(error: Exception) -> str:
    """Return the error's message or, if a class compares values of a wrong type, name the field."""
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
    """Return the innermost line of the file in the error's traceback; 0 = none."""
    passed = [line for frame, line in walk_tb(error.__traceback__) if _same(frame.f_code.co_filename, file)]
    return passed[-1] if passed else 0


def _frames(error: Exception) -> Iterator[FrameType]:
    return (frame for frame, _ in walk_tb(error.__traceback__))


def _same(name: str | None, file: Path) -> bool:
    return name is not None and Path(name).absolute() == file.absolute()

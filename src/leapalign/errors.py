"""Errors that end a command with one message: a user's mistake, a run that must stop, a run that was asked to stop.

Anything else is a bug in leapalign and prints its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MEMORY_SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
MAX_LETTERS, MAX_LINES = 2000, 30  # of one message; a library may list every weight


class UserError(Exception):
    """An input from outside (flag, file, folder, prompt, image) is wrong.

    The message says what came, what was expected and what to do. The command line prints only this message and exits
    with status 2.
    """

    elsewhere = False  # True if another rank raised it; that rank prints the message


class RunStopped(Exception):
    """A run cannot go on: NaN or infinity in reward, loss or gradient, or out of memory.

    The message names the step. No damaged state has been saved. The command line exits with status 1.
    """

    elsewhere = False  # as above


class NotFinite(RunStopped):
    """A tensor holds NaN or infinity; the message names step, prompt and tensor. No optimiser step was taken."""


class RunInterrupted(Exception):
    """A run was asked to stop (by a signal, or by `max_hours`), has saved a checkpoint and can be resumed.

    `status` is the command line's exit status: 128 + the signal's number, or 75 when `max_hours` are over.
    """

    elsewhere = False  # as above

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def opening(what: str, remedy: str) -> Iterator[None]:
    """Turn any error that a library raises while it reads a user's file into a UserError.

    The message is "`what`: the error; `remedy`", with `what` as in "FOLDER cannot be opened as CLASS".
    """
    try:
        yield
    except BaseException as error:  # on a broken file libraries raise errors of any type
        if not _is_library_error(error):
            raise
        raise UserError(f"{what}: {reason(error)}; {remedy}") from error


def first_time(function: Callable[P, R], what: str, remedy: str) -> Callable[P, R]:
    """Wrap `function` in `opening` until its first call has succeeded; later errors are not the files' fault."""
    succeeded = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal succeeded
        if succeeded:
            return function(*args, **kwargs)
        with opening(what, remedy):
            result = function(*args, **kwargs)
        succeeded = True
        return result

    return call


def _is_library_error(error: BaseException) -> bool:
    """Return whether a library raised it: not one of our errors, not out of memory. Includes panics of Rust code."""
    if type(error).__name__ == "PanicException":
        return True
    ours = (UserError, RunStopped, RunInterrupted)
    return isinstance(error, Exception) and not isinstance(error, ours) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means too little memory: Python's, torch's on any device, or the CPU allocator's."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def reason(error: BaseException) -> str:
    """Return an error's text, preceded by its type unless the text is a sentence (KeyError: 'x')."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", str(error).strip())
    plain = isinstance(error, (OSError, RuntimeError, ValueError)) and len(text.split()) > 2
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def readable(text: str) -> str:
    """Return the text fit for a terminal: control characters escaped, at most MAX_LINES lines of MAX_LETTERS in all."""
    text = re.sub(r"[^\S\n ]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _escaped, text)
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more lines"]
    text = "\n".join(lines)
    half = MAX_LETTERS // 2
    return text if len(text) <= MAX_LETTERS else f"{text[:half]} ... {text[-half:]}"


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()

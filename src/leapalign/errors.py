"""The ways a command ends without being a bug of ours: a user's mistake, a run that must stop, a run asked to stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MEMORY_SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
MOST_LETTERS, MOST_LINES = 2000, 30  # of a message: names of recipes fill ten lines, a library may list every weight


class UserError(Exception):
    """Something from outside (flag, file, folder, prompt, picture) is wrong.

    The message says what came, what was expected and what to do. The command line prints it alone and exits with 2.
    """

    elsewhere = False  # it happened to another rank of a distributed run, which says it


class RunStopped(Exception):
    """A run cannot go on: NaN or infinity in reward, loss or gradient, or too little memory.

    The message names the step. Nothing broken has been saved; the command line exits with 1.
    """

    elsewhere = False  # as above


class NotFinite(RunStopped):
    """NaN or infinity: the message names step, prompt and tensor. The batch was not stepped and may be skipped."""


class RunInterrupted(Exception):
    """A run that was asked to stop (a signal, or its time is up), has saved itself and can be resumed.

    `status` is the command line's exit status: 128 + the signal's number, or 75 when `max_hours` are over.
    """

    elsewhere = False  # as above

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def opening(what: str, remedy: str) -> Iterator[None]:
    """Around a library that reads a user's file: whatever it raises there is the file's fault, and a UserError.

    `what` ends the sentence's beginning ("FOLDER cannot be opened as CLASS"), `remedy` says what to do.
    """
    try:
        yield
    except BaseException as error:  # libraries meet a broken file with whatever their line happens to raise
        if not _of_a_library(error):
            raise
        raise UserError(f"{what}: {reason(error)}; {remedy}") from error


def first_time(function: Callable[P, R], what: str, remedy: str) -> Callable[P, R]:
    """`function`, whose calls are inside `opening` until one has gone well: then files are not what is wrong."""
    went_well = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal went_well
        if went_well:
            return function(*args, **kwargs)
        with opening(what, remedy):
            result = function(*args, **kwargs)
        went_well = True
        return result

    return call


def _of_a_library(error: BaseException) -> bool:
    """Neither ours, nor too little memory; a panic of a library in Rust is no Exception for Python."""
    if type(error).__name__ == "PanicException":
        return True
    ours = (UserError, RunStopped, RunInterrupted)
    return isinstance(error, Exception) and not isinstance(error, ours) and not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on any device, and what the CPU's allocator says."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def reason(error: BaseException) -> str:
    """What an error says, with its kind where that is the better half of it (KeyError: 'x')."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", str(error).strip())
    plain = isinstance(error, (OSError, RuntimeError, ValueError)) and len(text.split()) > 2
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def readable(text: str) -> str:
    """A message for a terminal, whatever bytes a name or a file in it has: no control characters, no pages."""
    text = re.sub(r"[^\S\n ]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _escaped, text)
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more lines"]
    text = "\n".join(lines)
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} ... {text[-half:]}"


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()

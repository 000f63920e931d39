"""A folder with everything that a user may give, one input at a time, and what every input must keep.

The files are made once; for each input they appear again as hard links (a run as copies, because it may be resumed), so
that whatever is written into one of them or put in its place is seen.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import leapalign

Files = dict[str, bytes]  # what is given, by path
LOCK = "/.lock"
SECONDS = 60  # that an input may take
RUNS = ("run", "lora")  # folders that `resume` may write into
DEFAULTS = ("samples", "runs", "cache", "new")  # where commands write that are not told where; `new` as run.json has it
MOST_LINES, MOST_LETTERS = 40, 5000  # of a message
UNREADABLE = re.compile(r"[\0\x1b]|<class '|object at 0x|Traceback \(most recent")
MESSAGE = re.compile(r"^(?:leapalign: .|╭─)", re.MULTILINE)


@dataclass(frozen=True)
class Change:
    """One of the user's files: other bytes, or `gone`, or a `folder` in its place, or a `link` to another place."""

    path: str
    content: bytes = field(default=b"", repr=False)
    instead: str = "bytes"  # bytes | gone | folder | link
    target: str = ""


@dataclass(frozen=True)
class Input:
    """A command line and what was done to the files before it."""

    kind: str
    argv: tuple[str, ...]
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str
    problem: str = ""  # empty: everything that must hold holds


class Hang(BaseException):
    """An input took longer than `SECONDS`; not an Exception, so that nothing takes it for a broken file."""


class Sandbox:
    """`box/given` is what there is, `box/work` the working folder of one input."""

    def __init__(self, box: Path, write: Callable[[Path], None]) -> None:
        self.box, self.given, self.work = box, box / "given", box / "work"
        self.given.mkdir(parents=True)
        write(self.given)
        self.files = {str(p.relative_to(self.given)): p.read_bytes() for p in self.given.rglob("*") if p.is_file()}

    def run(self, given: Input) -> Outcome:
        """In this process, through `main(argv)`."""
        return self._run(given, self._in_process)

    def run_process(self, given: Input) -> Outcome:
        """As `python -m leapalign`."""
        return self._run(given, self._as_process)

    def _run(self, given: Input, execute: Callable[[Sequence[str]], Outcome]) -> Outcome:
        self._prepare(given.changes)
        before, around = _state(self.work), self._around()
        outcome = execute(given.argv)
        problem = outcome.problem or _wrong_end(given, outcome)
        problem = problem or self._lost(given, outcome, before) or ("" if around == self._around() else "wrote outside")
        if problem:
            self._restore()
        return Outcome(outcome.status, outcome.out, outcome.err, problem)

    def _prepare(self, changes: Sequence[Change]) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        for folder, _, names in os.walk(self.given):
            target = self.work / Path(folder).relative_to(self.given)
            target.mkdir()
            copied = target.relative_to(self.work).parts[:1]
            place: Any = shutil.copy2 if copied and copied[0] in RUNS else os.link
            for name in names:
                place(os.path.join(folder, name), target / name)
        for change in changes:
            _apply(change, self.work / change.path)

    def _around(self) -> dict[str, Any]:
        """Everything but the working folder."""
        return _state(self.given) | {p.name: 0 for p in self.box.iterdir()}

    def _restore(self) -> None:
        """After a problem the given files may be damaged."""
        for name, content in self.files.items():
            path = self.given / name
            if not path.is_file() or path.read_bytes() != content:
                path.unlink(missing_ok=True)
                path.write_bytes(content)

    def _in_process(self, argv: Sequence[str]) -> Outcome:
        from leapalign.cli import main

        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2))
        status, problem, here = -1, "", os.getcwd()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            os.chdir(self.work)
            try:
                with at_most(SECONDS):
                    status = main(list(argv))
            except Hang:
                problem = f"no end after {SECONDS} s"
            except BaseException as error:  # the property is that there is none
                problem = f"{type(error).__name__}: {error}\n" + "".join(traceback.format_tb(error.__traceback__)[-6:])
            finally:
                os.chdir(here)
        return Outcome(status, _text(out), _text(err), problem)

    def _as_process(self, argv: Sequence[str]) -> Outcome:
        words = [sys.executable, "-m", "leapalign", *argv]
        here = os.environ | {"PYTHONPATH": str(Path(leapalign.__file__).parents[1])}  # whatever is installed
        try:
            ended = subprocess.run(words, cwd=self.work, env=here, capture_output=True, timeout=2 * SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(-1, "", "", f"no end after {2 * SECONDS} s")
        out, err = (stream.decode("utf-8", "backslashreplace") for stream in (ended.stdout, ended.stderr))
        return Outcome(ended.returncode, out, err)

    def _lost(self, given: Input, outcome: Outcome, before: dict[str, Any]) -> str:
        """Nothing that was there is changed or gone, and what is new lies where the command line says."""
        after, words = _state(self.work), _words(given.argv)
        own = [w for w in words if w in RUNS] if given.argv[:1] == ("resume",) and outcome.status != 2 else []
        if given.argv[:1] == ("compare",) and "--overwrite" in given.argv:
            own = words  # the files that it is told to replace
        pictures = "--overwrite" in given.argv
        changed = [p for p, state in before.items() if after.get(p) != state and not _below(p, own)]
        changed = [p for p in changed if not p.endswith(LOCK)]  # says who worked on the run last
        changed = [p for p in changed if not (pictures and p.endswith((".png", "metadata.jsonl")))]
        if changed:
            return f"changed or removed: {', '.join(changed[:5])}"
        places = [*words, *DEFAULTS]
        new = [p for p in after if p not in before and not _below(p, places) and not _leads_to(p, places)]
        return f"written elsewhere: {', '.join(new[:5])}" if new else ""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Hang inside when the time is over; the alarm of pytest-timeout waits meanwhile."""

    def ring(*_: object) -> None:
        raise Hang

    handler = signal.signal(signal.SIGALRM, ring)
    waiting, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, waiting)
        signal.signal(signal.SIGALRM, handler)


def _apply(change: Change, path: Path) -> None:
    """Never through the link: the given files stay as they are."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if change.instead == "bytes":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change.content)
    elif change.instead == "folder":
        path.mkdir()
    elif change.instead == "link":
        path.symlink_to(change.target)


def _state(folder: Path) -> dict[str, Any]:
    """Path -> what no write and no replacement leaves alone."""
    state: dict[str, Any] = {}
    for place, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)
            state[os.path.relpath(path, folder)] = 0 if is_folder else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return state


def _wrong_end(given: Input, outcome: Outcome) -> str:
    """0; or 2 with one message; or what the command documents."""
    status, err = outcome.status, outcome.err
    if "Traceback" in err or "Traceback" in outcome.out:
        return "a traceback"
    if status == 1:
        stopped = (
            len(re.findall(r"^leapalign: stopped(?: at|: out of memory) .", err, re.MULTILINE)) == 1
        )  # NaN, or too little memory
        differs = given.argv[:1] == ("verify",) and re.search(r'NOT as it should be|"good": false', outcome.out)
        return "" if stopped or differs else "status 1 without its reason"
    if status == 75:
        return "" if "which is saved; `leapalign resume" in err else "status 75 without its reason"
    if status not in (0, 2):
        return f"status {status}"
    return _wrong_message(err) if status == 2 else ""


def _wrong_message(err: str) -> str:
    """One, short, for people."""
    found = list(MESSAGE.finditer(err))
    if not found:
        return "" if err.strip().startswith("usage: ") else "no message"
    if len(found) > 1:
        return "more than one message"
    message = err[found[0].start() :]
    if len(message) > MOST_LETTERS or message.count("\n") > MOST_LINES:
        return f"a message of {len(message)} letters in {message.count(chr(10))} lines"
    if odd := UNREADABLE.search(message):
        return f"{odd[0]!r} in the message"
    return "" if len(message.split()) > 3 else "a message of hardly a word"


def _words(argv: Sequence[str]) -> list[str]:
    """Whatever of a command line may name a place below the working folder."""
    parts = [part for word in argv for part in (word, *word.split("=", 1)[1:])]
    return [os.path.normpath(part) for part in parts if not part.startswith("/")]


def _below(path: str, places: Sequence[str]) -> bool:
    return any(place == "." or path == place or path.startswith(place + os.sep) for place in places)


def _leads_to(path: str, places: Sequence[str]) -> bool:
    return any(place.startswith(path + os.sep) for place in places)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]

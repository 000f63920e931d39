"""A closed terminal, a log reader that goes away and closed standard streams: the run goes on, saves, and says how."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from leapalign.checkpoint import checkpoints
from leapalign.cli import entry_point
from leapalign.codec import dumps
from leapalign.lookup.recipes import load_file
from leapalign.training import loop
from leapalign.training.tracking import read_metrics

PROCESSES = load_file(str(Path(__file__).with_name("processes.py")))
STREAMS = "from leapalign.cli.streams import prepare_streams; prepare_streams({command!r}); import os, sys; {rest}"


@pytest.fixture
def started(tmp_path, recipe_file):
    """started(run, handle) -> the installed command in a process whose stdout and stderr are `handle`, at step 3."""

    def start(run, handle: int):
        (tmp_path / "given.json").write_text(dumps(run))

        def command() -> int:
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            sys.argv = ["leapalign", "train", str(tmp_path / "given.json"), "--plugin", str(recipe_file)]
            try:
                entry_point()
            except SystemExit as end:
                return end.code
            return 98

        child = PROCESSES.fork(command, tmp_path / "log")
        metrics = Path(run.out) / "metrics.jsonl"
        PROCESSES.until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 3)
        return child

    return start


@pytest.mark.parametrize(("number", "status"), [(0, 0), (signal.SIGINT, 130)])
def test_a_run_whose_log_reader_has_gone_goes_on_to_its_end_or_saves(tiny_run, started, number, status):
    """`| head`, and Ctrl-C with `| tee`, which gets the signal too and ends first."""
    run = tiny_run(steps=10_000 if number else 150, checkpoint_every=10_000, evaluate_every=0)
    reader, writer = os.pipe()
    child = started(run, writer)
    os.close(writer)
    os.close(reader)
    if number:
        child.signal(number)
    ended, said = child.wait()
    assert ended == status, said
    last = read_metrics(Path(run.out))[-1]["step"]
    assert [path.name for path in checkpoints.complete(run)] == [f"step-{last:06d}"]
    assert (Path(run.out) / "summary.json").exists() == (not number)
    log = (Path(run.out) / "log.txt").read_text()
    assert (f"stopped by SIGINT after step {last} of 10000, which is saved" in log) == bool(number)


@pytest.mark.parametrize(("ignored", "status"), [(False, 129), (True, 0)])
def test_a_terminal_that_is_closed_saves_the_run_and_under_nohup_does_not_end_it(tiny_run, started, ignored, status):
    run = tiny_run(steps=150, checkpoint_every=10_000, evaluate_every=0)
    terminal, side = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        child = started(run, side)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(side)
    os.close(terminal)
    child.signal(signal.SIGHUP)  # the kernel's own goes to a session leader, which a test's child is not
    ended, said = child.wait()
    assert ended == status, said
    assert len(checkpoints.complete(run)) == 1 and (Path(run.out) / "summary.json").exists() == ignored


def test_the_library_too_drops_what_stderr_does_not_take(tiny_run, monkeypatch):
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self) -> bool:
            return False

    run = tiny_run(steps=2)
    loop.train(run)
    monkeypatch.setattr(sys, "stderr", Gone())
    run = tiny_run(steps=4, prompts=run.prompts)
    assert loop.train(run, resume=True).summary["steps"] == 4
    monkeypatch.undo()
    assert "resuming from step-000002" in (Path(run.out) / "log.txt").read_text()


def test_how_a_process_ended_is_in_the_log(tiny_run, tiny_module, monkeypatch):
    """Errors of the user and bugs: their message may not have reached any terminal."""
    run = tiny_run(steps=3)

    def fail(metrics: object) -> None:
        raise ZeroDivisionError("a bug in a callback")

    with pytest.raises(ZeroDivisionError):
        loop.train(run, on_step=fail)
    log = (Path(run.out) / "log.txt").read_text()
    assert f"process {os.getpid()}: Traceback" in log and "a bug in a callback" in log


def python(words: str, shell: str) -> subprocess.CompletedProcess[str]:
    """`shell`'s {python} runs `words`."""
    script = shell.format(python=f'"{sys.executable}" -c "$WORDS"')
    return subprocess.run(["bash", "-c", script], env=os.environ | {"WORDS": words}, capture_output=True, text=True)


def test_closed_descriptors_are_given_to_no_file(tmp_path):
    rest = "f = open('out', 'w'); print('lost', file=sys.stderr); print('lost'); os.write(2, b'lost'); f.write('kept')"
    words = f"import os; os.chdir({str(tmp_path)!r}); " + STREAMS.format(command="list", rest=rest)
    assert python(words, "{python} >&- 2>&- <&-").returncode == 0
    assert (tmp_path / "out").read_text() == "kept"


def test_the_command_starts_without_stderr():
    ended = python(
        "import sys; sys.argv[1:] = ['--version']; import leapalign.cli as c; c.entry_point()", "{python} 2>&-"
    )
    assert ended.returncode == 0 and ended.stdout.startswith("leapalign ")


@pytest.mark.parametrize(("command", "good"), [("train", True), ("list", False)])
def test_a_training_command_ends_well_without_a_reader_and_a_list_does_not(command, good):
    """To the interpreter's own end, whose flush of stdout can fail as well."""
    words = STREAMS.format(command=command, rest="print('x' * 100_000, file=sys.stderr); print('a line')")
    ended = python(words, "exec 3>&1; {{ sleep 0.2; {python} 2>&1; echo $? >&3; }} | true")
    assert (ended.stdout == "0\n") == good

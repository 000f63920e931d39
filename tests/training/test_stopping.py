"""Signals, the end of the time, and two processes on one folder."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from leapalign.checkpoint import async_writer, checkpoints, formats
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.errors import RunInterrupted, UserError
from leapalign.lookup.recipes import load_file
from leapalign.storage.lock import HOLDER, LOCK, run_lock
from leapalign.training import loop, preemption
from leapalign.training.preemption import Stop, on_signals
from leapalign.training.tracking import read_metrics

PROCESSES = load_file(str(Path(__file__).with_name("processes.py")))


def trace(out: Path | str) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(Path(out))]


def weights(run) -> list[str]:
    newest = checkpoints.find(run)
    assert newest
    return [newest.folder.name, *(newest.state["files"][f"{group}.safetensors"] for group in formats.GROUPS)]


@pytest.fixture
def started(tiny_run, tmp_path, recipe_file):
    """started(run) -> a process that trains it, once it has made three steps."""
    children = []

    def start(run):
        (tmp_path / "given.json").write_text(dumps(run))
        words = ["train", str(tmp_path / "given.json"), "--plugin", str(recipe_file)]
        children.append(PROCESSES.fork(lambda: main(words), tmp_path / "log"))
        metrics = Path(run.out) / "metrics.jsonl"
        PROCESSES.until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 3)
        return children[-1]

    return start


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_the_run_resumes_exactly(
    tiny_run, tmp_path, started, recipe_file, number, status
):
    run = tiny_run(steps=10_000, checkpoint_every=10_000, evaluate_every=0)
    child = started(run)
    child.signal(number)
    ended, said = child.wait()
    assert ended == status, said
    assert f"stopped by {number.name} after step" in said and f"`leapalign resume {run.out}` goes on" in said
    assert "Traceback" not in said
    (saved,) = checkpoints.complete(run)
    step = int(saved.name.removeprefix("step-"))
    assert [m["step"] for m in trace(run.out)] == list(range(1, step + 1))
    resume = ["resume", run.out, "--plugin", str(recipe_file), "--steps", str(step + 2)]
    assert main(resume) == 0
    whole = replace(run, out=str(tmp_path / "whole"), steps=step + 2)
    loop.train(whole)
    assert weights(run) == weights(whole) and trace(run.out) == trace(whole.out)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)])
def test_a_hangup_and_the_signals_of_slurm_and_submitit_finish_the_step_and_save(tiny_run, started, number, status):
    run = tiny_run(steps=10_000, checkpoint_every=10_000, evaluate_every=0)
    child = started(run)
    child.signal(number)
    ended, said = child.wait()
    assert ended == status, said
    (saved,) = checkpoints.complete(run)
    assert saved.name == f"step-{trace(run.out)[-1]['step']:06d}"
    assert f"stopped by {number.name} after step" in (Path(run.out) / "log.txt").read_text()


def test_a_second_sigint_leaves_at_once_with_the_last_checkpoint_whole(tiny_run, tmp_path, monkeypatch):
    """The second one comes while the first one's checkpoint is being written, which would take a minute."""
    run = tiny_run(steps=10_000, checkpoint_every=3, evaluate_every=0)
    write = checkpoints._write
    monkeypatch.setattr(
        checkpoints,
        "_write",
        lambda target, *rest: write(target, *rest) if target.name == "step-000003" else time.sleep(60),
    )
    (tmp_path / "given.json").write_text(dumps(run))
    words = ["train", str(tmp_path / "given.json"), "--plugin", str(Path(__file__).with_name("tiny_recipe.py"))]

    def train() -> int:
        status = main(words)
        sys.exit(status)  # as the installed command: through the interpreter's own end

    child = PROCESSES.fork(train, tmp_path / "log")
    PROCESSES.until(lambda: bool(checkpoints.complete(run)))
    child.signal(signal.SIGINT)
    PROCESSES.until(lambda: "finishing this step and saving" in (tmp_path / "log").read_text())
    time.sleep(0.3)
    begun = time.monotonic()
    child.signal(signal.SIGINT)
    _, said = child.wait()
    assert time.monotonic() - begun < 30
    assert "goes on from the last checkpoint" in said and "SystemExit(130)" in said
    assert checkpoints.find(run).folder.name == "step-000003"


def test_a_run_stops_in_time_to_save_and_comes_to_the_same_end(tiny_run, tmp_path, recipe_file, capsys):
    whole = tiny_run(out=str(tmp_path / "whole"), steps=4)
    loop.train(whole)
    run = tiny_run(steps=4, max_hours=1e-6)  # each process makes one step
    with pytest.raises(RunInterrupted, match=r"stopped in time for max_hours \(1e-06\) after step 1 of 4") as stopped:
        loop.train(run)
    assert stopped.value.status == 75
    resume = ["resume", run.out, "--plugin", str(recipe_file)]
    assert main(resume) == 75 and main([*resume, "--max-hours", "1e-6"]) == 75
    assert "after step 3 of 4, which is saved" in capsys.readouterr().err
    assert main([*resume, "--max-hours", "0"]) == 0
    assert weights(run) == weights(whole) and trace(run.out) == trace(whole.out)


def test_time_for_a_step_and_a_save_is_kept(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    stop = Stop(max_seconds=100, begun=0.0)
    now[0] = 1000.0
    assert stop.reason(5) is None  # the first step is always made
    stop.took(10)
    stop.took(2)
    now[0] = 100 - 1.2 * 15 - 0.1
    assert stop.reason(5) is None and stop.reason(6) == ("stopped in time for max_hours (0.0277778)", 75)
    assert Stop(begun=0.0, longest_step=1).reason(1e9) is None  # no limit


def test_an_unmeasured_save_is_reckoned_by_its_bytes(tiny_run):
    engine = loop.build(tiny_run())
    size = sum(4 * p.numel() * p.element_size() for p in engine.parameters.values())
    assert (
        async_writer.Saver(asynchronous=True, parameters=engine.parameters).seconds_needed()
        == size / async_writer.SLOW_DISK
    )


def test_handlers_are_put_back_and_a_signal_that_is_off_stays_off():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with on_signals(stop):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_second_process_on_a_folder_is_refused_until_the_first_is_dead(tiny_run, tmp_path):
    run = tiny_run()
    loop.train(run)

    def hold() -> int:
        with run_lock(Path(run.out)):
            (tmp_path / "held").touch()
            time.sleep(60)
        return 0

    child = PROCESSES.fork(hold, tmp_path / "log")
    PROCESSES.until((tmp_path / "held").exists)
    before = {p: p.stat().st_mtime_ns for p in Path(run.out).rglob("*") if not p.name.startswith(".lock")}
    with pytest.raises(UserError, match=rf"process {child.pid} on .* works on this run"):
        loop.train(replace(run, steps=6), resume=True)
    assert {p: p.stat().st_mtime_ns for p in Path(run.out).rglob("*") if not p.name.startswith(".lock")} == before
    child.signal(signal.SIGKILL)
    child.wait()
    assert loop.train(replace(run, steps=5), resume=True).summary["steps"] == 5


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError("flock")])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr("leapalign.storage.lock.FileLock._acquire", refuse)
    with run_lock(tmp_path):
        pass
    assert "has no locks; start one process" in capsys.readouterr().err


def test_one_process_does_not_lock_twice_and_a_lock_of_a_dead_process_is_free(tmp_path):
    (tmp_path / HOLDER).write_text("process 1 on a machine of yesterday")
    said = f"process {os.getpid()} on .* works on this run"
    with run_lock(tmp_path), pytest.raises(UserError, match=said), run_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_folder_that_holds_a_lock_alone_is_empty(tiny_run):
    """What a train that failed while loading leaves: the mistake is mended and the same command works."""
    run = tiny_run()
    with pytest.raises(UserError, match="cannot checkpoint its blocks"):
        loop.train(replace(run, graph="blocks"))
    assert json.dumps([p.name for p in Path(run.out).iterdir()]) == '[".lock"]'
    assert loop.train(run).summary["steps"] == 4

"""Saving beside the training: equal bytes, one at a time, no error lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from leapalign.checkpoint import checkpoints, formats
from leapalign.checkpoint.async_writer import Copies, Saver
from leapalign.checkpoint.state import Progress
from leapalign.errors import RunStopped, UserError
from leapalign.training import direct, loop


def files_of(run) -> dict[str, str]:
    found = checkpoints.find(run)
    assert found
    return {name: digest for name, digest in found.state["files"].items() if name != "run.json"}


@pytest.fixture
def engine(tiny_run):
    engine = loop.build(tiny_run(keep_checkpoints=9))
    (Path(engine.run.out) / "checkpoints").mkdir(parents=True)
    return engine


def snapshot(engine, step):
    parts = (engine.parameters, engine.ema.shadow, engine.optimizer)
    return checkpoints.take(engine.run, Progress(step=step), *parts)


def saver_of(engine, asynchronous=True) -> Saver:
    return Saver(asynchronous=asynchronous, parameters=engine.parameters)


def test_both_ways_of_saving_write_the_same_bytes(tiny_run, tmp_path):
    runs = [tiny_run(out=str(tmp_path / str(way)), checkpoint_every=1, async_checkpoints=way) for way in (True, False)]
    for run in runs:
        loop.train(run)
    assert files_of(runs[0]) == files_of(runs[1])


def test_what_is_written_is_what_was_there_when_save_was_called(engine, monkeypatch):
    """Training goes on and changes every weight before the thread has written the first byte."""
    go, write = threading.Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args: go.wait(60) and write(*args))
    direct.update(engine, 0)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    with saver_of(engine) as saver:
        saver.save(snapshot(engine, 1), lambda: None)
        direct.update(engine, 1)
        go.set()
    fresh = loop.build(engine.run)
    checkpoints.restore(checkpoints.find(engine.run), fresh.parameters, fresh.ema.shadow, fresh.optimizer)
    assert all(torch.equal(p, before[name]) for name, p in fresh.parameters.items())
    assert not torch.equal(engine.parameters["0.weight"], before["0.weight"])


def test_the_next_save_waits_for_the_last_and_none_is_left_out(engine, monkeypatch):
    order, write = [], checkpoints.save

    def slow(taken, sync):
        order.append(f"begin {taken.step}")
        threading.Event().wait(0.2)
        write(taken, sync)
        order.append(f"end {taken.step}")

    monkeypatch.setattr(checkpoints, "save", slow)
    with saver_of(engine) as saver:
        for step in (1, 2, 3):
            saver.save(snapshot(engine, step), lambda: None)
        assert saver.seconds_needed() >= 0.4  # its own, and the one that is being written
    assert order == [f"{what} {step}" for step in (1, 2, 3) for what in ("begin", "end")]
    assert [p.name for p in checkpoints.complete(engine.run)] == ["step-000001", "step-000002", "step-000003"]


@pytest.mark.parametrize("when", ["next step", "next save", "end"])
def test_an_error_of_the_thread_reaches_the_run(engine, monkeypatch, when):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "save", fail)
    with pytest.raises(OSError, match="Input/output"), saver_of(engine) as saver:
        saver.save(snapshot(engine, 1), lambda: None)
        saver._thread.join()
        if when == "next step":
            saver.check()
        if when == "next save":
            saver.save(snapshot(engine, 2), lambda: None)
        assert when == "end", "the error was not raised"


def test_an_error_of_the_run_waits_for_the_save_and_tells_of_its_failure(engine, monkeypatch, capsys):
    with pytest.raises(RunStopped), saver_of(engine) as saver:
        saver.save(snapshot(engine, 1), lambda: None)
        raise RunStopped("step 2")
    assert checkpoints.find(engine.run).state["step"] == 1
    monkeypatch.setattr(checkpoints, "save", lambda *_: 1 / 0)
    with pytest.raises(RunStopped), saver_of(engine) as saver:
        saver.save(snapshot(engine, 2), lambda: None)
        raise RunStopped("step 3")
    assert "the checkpoint of step 2 could not be saved: division by zero" in capsys.readouterr().err


def test_metrics_are_on_the_disk_before_the_checkpoint_has_its_name(engine):
    seen = []
    checkpoints.save(snapshot(engine, 1), lambda: seen.append(checkpoints.complete(engine.run)))
    assert seen == [[]]


def test_copies_use_their_memory_again():
    copies, tensor = Copies(), torch.arange(4.0)
    first = copies.of({"a": {"x": tensor}})["a"]["x"]
    tensor += 1
    assert first.tolist() == [0, 1, 2, 3]
    second = copies.of({"a": {"x": tensor, "y": tensor}})["a"]
    assert second["x"].data_ptr() == first.data_ptr() != second["y"].data_ptr()
    assert second["x"].tolist() == [1, 2, 3, 4]


@pytest.mark.gpu
def test_copies_of_a_device_are_pinned_and_complete():
    tensor = torch.randn(1 << 20, device="cuda")
    copy = Copies().of({"a": {"x": tensor}})["a"]["x"]
    assert copy.is_pinned() and torch.equal(copy, tensor.cpu())


def test_a_failed_save_ends_the_run_with_a_sentence(tiny_run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "save_file", full)
    run = tiny_run()
    with pytest.raises(UserError, match=r"the disk is full \(\d+ MiB are free\); make room, then `leapalign resume"):
        loop.train(run)
    assert list((Path(run.out) / "checkpoints").iterdir()) == []  # nor does the half of it fill the disk
    monkeypatch.undo()
    assert loop.train(run, resume=True).summary["steps"] == 4

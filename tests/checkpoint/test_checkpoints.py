"""Checkpoints: resumed runs equal undisturbed ones bit for bit, and a kill at any moment leaves a complete one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leapalign.checkpoint import checkpoints, formats
from leapalign.errors import UserError
from leapalign.storage import atomic
from leapalign.storage.files import sha256
from leapalign.training import direct, loop
from leapalign.training.tracking import read_metrics, truncate_metrics


def digests(out: Path | str) -> dict[str, str]:
    """sha256 of all that a run's last state is."""
    folder = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    return {path.name: sha256(path) for path in folder.glob("*.safetensors")} | {"step": folder.name}


def trace(out: Path | str) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(Path(out))]


def command(*args: str | Path, cwd: Path) -> str:
    words = [sys.executable, "-m", "leapalign", *map(str, args)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ten_steps_equal_five_and_a_new_process_and_five(tiny_run, recipe_file, tmp_path):
    whole = tiny_run(steps=10, warmup_steps=7, evaluate_every=5, checkpoint_every=5, out=str(tmp_path / "whole"))
    loop.train(whole)
    recipe = [
        "train",
        f"{recipe_file}:tiny",
        "--prompts.path",
        "prompts.txt",
        "--evaluate-every",
        "5",
        "--out",
        "parts",
    ]
    recipe += ["--warmup-steps", "7"]
    command(*recipe, "--steps", "5", cwd=tmp_path)
    answer = command("resume", "parts", "--steps", "10", "--plugin", recipe_file, "--json", cwd=tmp_path)
    assert json.loads(answer)["steps"] == 10
    assert digests(tmp_path / "parts") == digests(whole.out)
    assert trace(tmp_path / "parts") == trace(whole.out)


def test_resume_drops_what_was_logged_after_the_checkpoint(tiny_run, tmp_path):
    whole, cut = tiny_run(steps=6), tiny_run(steps=6, out=str(tmp_path / "cut"))
    loop.train(whole)

    class Killed(BaseException):
        pass

    def kill(metrics):
        if metrics["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        loop.train(cut, on_step=kill)
    with (Path(cut.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert len((Path(cut.out) / "metrics.jsonl").read_text().splitlines()) == 7
    loop.train(cut, resume=True)
    assert trace(cut.out) == trace(whole.out) and digests(cut.out) == digests(whole.out)


def test_a_run_without_a_checkpoint_resumes_at_its_start(tiny_run, tmp_path):
    def kill(metrics):
        raise KeyboardInterrupt

    cut = tiny_run(out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        loop.train(cut, on_step=kill)
    loop.train(cut, resume=True)
    assert [m["step"] for m in trace(cut.out)] == [0, 1, 2, 3, 4]


def test_killed_at_any_moment_of_a_save(tiny_run, tmp_path):
    """A child is killed at its n-th fsync, rename or removal, for every n until a save gets through."""
    run = tiny_run(keep_checkpoints=1)
    engine = loop.build(run)
    parts = (engine.parameters, engine.ema.shadow, engine.optimizer)
    direct.update(engine, 0)
    (Path(run.out) / "checkpoints").mkdir(parents=True)
    checkpoints.save(checkpoints.take(run, checkpoints.Progress(step=1), *parts))
    direct.update(engine, 1)
    newer = {name: p.detach().clone() for name, p in engine.parameters.items()}
    for moment in range(100):
        copy = replace(run, out=str(tmp_path / f"killed-{moment}"))
        shutil.copytree(run.out, copy.out)
        status = _save_and_die(copy, parts, moment)
        fresh = loop.build(copy)
        progress = checkpoints.restore(checkpoints.find(copy), fresh.parameters, fresh.ema.shadow, fresh.optimizer)
        assert progress.step in (1, 2)
        left = {p.name for p in (Path(copy.out) / "checkpoints").iterdir()}
        assert left <= {"step-000001", "step-000002", "newest.json"}
        same = all(torch.equal(p, newer[name]) for name, p in fresh.parameters.items())
        assert same == (progress.step == 2)
        if status == 0:
            break
    assert moment > 12 and progress.step == 2
    assert [p.name for p in checkpoints.complete(copy)] == ["step-000002"]


def _save_and_die(run, parts, moment: int) -> int:
    pid = os.fork()
    if pid == 0:
        left = [moment]

        def counted(call):
            def wrapper(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)

            return wrapper

        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            checkpoints.save(checkpoints.take(run, checkpoints.Progress(step=2), *parts))
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_only_the_last_ones_are_kept(tiny_run):
    loop.train(tiny_run(steps=6, checkpoint_every=1, keep_checkpoints=2))
    run = tiny_run()
    assert [p.name for p in checkpoints.complete(run)] == ["step-000005", "step-000006"]


def test_a_changed_setting_is_refused_and_listed(tiny_run):
    run = tiny_run()
    loop.train(run)
    changed = replace(run, learning_rate=0.5, steps=8, method=replace(run.method, nested_scale=0.1))
    with pytest.raises(UserError) as refused:
        loop.train(changed, resume=True)
    text = str(refused.value)
    assert "learning_rate: 0.01 -> 0.5" in text and "method.nested_scale: 0.3 -> 0.1" in text and "steps" not in text


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "run.json", "state.json"])
def test_a_damaged_checkpoint_is_named_with_the_older_one(tiny_run, name):
    run = tiny_run()
    loop.train(run)
    path = Path(run.out) / "checkpoints" / "step-000004" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) - 1] if name == "state.json" else data)
    with pytest.raises(UserError, match=r"step-000004: the checkpoint is damaged .*--checkpoint step-000002`"):
        loop.train(replace(run, steps=6), resume=True)


def test_a_checkpoint_holds_no_pickle(tiny_run):
    run = tiny_run()
    loop.train(run)
    kinds = {path.suffix for path in (Path(run.out) / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_adamw_goes_on_exactly(tiny_run):
    """The optimiser's state is restored: without it the third step would be a first one."""
    run = tiny_run(steps=2)
    engine = loop.train(run).engine
    fresh = loop.build(run)
    checkpoints.restore(checkpoints.find(run), fresh.parameters, fresh.ema.shadow, fresh.optimizer)
    saved, restored = (formats.optimizer_tensors(e.parameters, e.optimizer) for e in (engine, fresh))
    assert len(saved) == 3 * len(engine.parameters) and float(saved["0.weight.step"]) == 2
    assert saved.keys() == restored.keys() and all(torch.equal(saved[k], restored[k]) for k in saved)


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "thing"
    with atomic.complete_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ValueError), atomic.complete_folder(target) as folder:
        (folder / "b").write_text("2")
        raise ValueError
    assert [p.name for p in target.iterdir()] == ["a"]
    atomic.clear_scratch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_metrics_are_cut_at_the_checkpoints_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    truncate_metrics(path, 24)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    for other in (23, 25):  # within a line, and beyond the end
        with pytest.raises(UserError, match="some are lost or changed"):
            truncate_metrics(path, other)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    path.unlink()
    truncate_metrics(path, 24)
    assert not path.exists()

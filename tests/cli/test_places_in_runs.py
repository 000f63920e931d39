"""A folder or file inside a run where a run is wanted: the run and the flag are named."""

from __future__ import annotations

import shutil

import pytest

from leapalign.cli import main


@pytest.fixture
def run(tmp_path):
    step = tmp_path / "RUN" / "checkpoints" / "step-000004"
    step.mkdir(parents=True)
    for file in (step / "weights.safetensors", step / "state.json", step / "run.json", tmp_path / "RUN" / "run.json"):
        file.write_text("{}")
    return tmp_path / "RUN"


@pytest.mark.parametrize(
    ("inside", "flag"),
    [
        ("checkpoints/step-000004", " --checkpoint step-000004"),
        ("checkpoints/step-000004/weights.safetensors", " --checkpoint step-000004"),
        ("checkpoints/step-000004/run.json", " --checkpoint step-000004"),
        ("checkpoints/unused-step-000004", ""),
        ("checkpoints", ""),
        ("run.json", ""),
    ],
)
def test_resume_names_the_run_and_the_checkpoint(run, inside, flag, capsys, monkeypatch):
    assert main(["resume", str(run / inside)]) == 2
    assert f"`leapalign resume {run}{flag}`" in capsys.readouterr().err
    monkeypatch.chdir(run)
    assert main(["resume", inside]) == 2
    assert f"`leapalign resume .{flag}`" in capsys.readouterr().err


def test_from_inside_of_the_checkpoints(run, capsys, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert main(["resume", "step-000004"]) == 2
    assert "`leapalign resume .. --checkpoint step-000004`" in capsys.readouterr().err


def test_export_and_the_commands_that_take_any_model_name_the_run(run, capsys, tmp_path):
    assert main(["export", str(run / "checkpoints" / "step-000004"), "--out", str(tmp_path / "out")]) == 2
    assert f"`leapalign export {run}`" in capsys.readouterr().err
    assert main(["sample", str(run / "checkpoints"), "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    assert f"give the run's folder, {run}\n" in capsys.readouterr().err


def test_a_checkpoint_that_was_moved_out_of_its_run(run, capsys, tmp_path):
    shutil.move(run / "checkpoints" / "step-000004", tmp_path / "step-000004")
    shutil.rmtree(run)
    assert main(["resume", str(tmp_path / "step-000004" / "weights.safetensors")]) == 2
    assert "move it to RUN/checkpoints/step-000004" in capsys.readouterr().err

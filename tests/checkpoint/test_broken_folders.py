"""Full disks, read-only, deleted, damaged and manipulated folders, changed settings: a sentence, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from leapalign.checkpoint import checkpoints, formats
from leapalign.checkpoint.state import digest, versions
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.errors import UserError
from leapalign.storage.atomic import disk_errors, refuse_links_out
from leapalign.storage.files import sha256
from leapalign.training import loop, session
from leapalign.training.tracking import read_metrics


def contents(folder: Path) -> dict[str, str]:
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock" and "tensorboard" not in p.parts)
    return {str(p.relative_to(folder)): sha256(p) for p in paths}


def weights(run) -> list[str]:
    newest = checkpoints.find(run)
    assert newest
    return [newest.folder.name, *(newest.state["files"][f"{group}.safetensors"] for group in formats.GROUPS)]


@pytest.fixture
def trained(tiny_run):
    """A run of four steps with checkpoints of steps 2 and 4."""
    run = tiny_run()
    loop.train(run)
    return run


def damage(run, kind: str) -> None:
    folder = Path(run.out) / "checkpoints" / "step-000004"
    path = folder / "weights.safetensors"
    if kind == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "missing":
        path.unlink()
    elif kind == "step changed":
        state = (folder / "state.json").read_text()
        (folder / "state.json").write_text(state.replace('"step": 4', '"step": 3'))
    elif kind == "deleted":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    elif kind == "unlisted":
        state = json.loads((folder / "state.json").read_text())
        del state["files"]["ema.safetensors"], state["self"]
        (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))
    elif kind == "layout":
        state = json.loads((folder / "state.json").read_text()) | {"layout": "striped"}
        del state["self"]
        (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))


KINDS = {
    "flipped": "weights.safetensors was changed after it was written",
    "truncated": "weights.safetensors was changed after it was written",
    "missing": "weights.safetensors is missing or unknown",
    "step changed": "state.json was changed after it was written",
    "deleted": "this checkpoint was deleted",
    "unlisted": "ema.safetensors is missing or unknown",
    "layout": "its layout is 'striped', and this version reads whole, sharded",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_named_and_the_older_good_one_offered(trained, tmp_path, kind):
    damage(trained, kind)
    before = contents(Path(trained.out))
    with pytest.raises(UserError, match="step-000004: ") as refused:
        loop.train(replace(trained, steps=6), resume=True)
    said = str(refused.value)
    assert KINDS[kind] in said
    assert f"step-000002 is intact: continue from it, `leapalign resume {trained.out} --checkpoint step-000002`" in said
    assert contents(Path(trained.out)) == before  # nothing is overwritten


def test_the_offer_is_taken_and_the_bad_one_is_kept(trained, tmp_path, recipe_file, capsys):
    whole = replace(trained, out=str(tmp_path / "whole"), steps=6)
    loop.train(whole)
    damage(trained, "flipped")
    kept = contents(Path(trained.out) / "checkpoints" / "step-000004")
    lines = (Path(trained.out) / "metrics.jsonl").read_bytes()
    words = ["resume", trained.out, "--plugin", str(recipe_file), "--steps", "6", "--checkpoint"]
    assert main([*words, "step-000003"]) == 2
    assert "no checkpoint is named 'step-000003'; the run has step-000002, step-000004" in capsys.readouterr().err
    assert main([*words, "step-000002"]) == 0
    said = capsys.readouterr().err
    assert "resuming from step-000002" in said and "kept as unused-step-000004" in said
    aside = Path(trained.out) / "checkpoints" / "unused-step-000004"
    assert contents(aside) == kept and aside.with_name(f"{aside.name}.metrics.jsonl").read_bytes() == lines
    assert weights(trained) == weights(whole)
    for run in (trained, whole):
        assert [m["step"] for m in read_metrics(Path(run.out))] == list(range(7))
    assert main([*words, "step-000004"]) == 0  # a second time: neither is replaced
    assert aside.is_dir() and aside.with_name("unused-step-000006").is_dir()


def test_where_nothing_good_is_left_the_way_out_is_another_folder(trained):
    damage(trained, "flipped")
    older = Path(trained.out) / "checkpoints" / "step-000002" / "ema.safetensors"
    older.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no other checkpoint is intact: train again, `leapalign train .*run.json --out ANOTHER`"
    ):
        loop.train(replace(trained, steps=6), resume=True)


def test_a_deleted_folder_of_checkpoints_does_not_begin_the_run_again(trained):
    folder = Path(trained.out) / "checkpoints"
    folder.rename(folder.with_name("elsewhere"))
    before = contents(Path(trained.out))
    with pytest.raises(UserError, match="checkpoints: this folder was deleted"):
        loop.train(replace(trained, steps=6), resume=True)
    assert contents(Path(trained.out)) == before


@pytest.mark.parametrize("spoilt", [b"\xff", b"[", b"1", b'"'])
def test_a_changed_line_of_metrics_is_named_before_anything_is_replaced(trained, spoilt):
    path = Path(trained.out) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = spoilt * len(lines[1])  # as long as it was
    path.write_bytes(b"\n".join(lines))
    before = contents(Path(trained.out))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: this is not a JSON object, .*; put it back"):
        loop.train(replace(trained, steps=6), resume=True)
    assert contents(Path(trained.out)) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "run.json", "checkpoints"])
def test_another_kind_of_thing_is_named_before_training(trained, name):
    path = Path(trained.out) / name
    path.rename(path.with_name("moved"))
    path.write_text("") if name == "checkpoints" else path.mkdir()
    with pytest.raises(UserError, match=rf"{name} is a (file|folder), and a run .* there; move it away"):
        loop.train(replace(trained, steps=6), resume=True)


def test_a_forged_checkpoint_whose_sums_are_right(trained):
    """Headers that lie, and JSON without end: what the sums say is true, and what they are of is no checkpoint."""
    folder = Path(trained.out) / "checkpoints" / "step-000004"
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"X32"'))
    state = json.loads((folder / "state.json").read_text())
    del state["self"]
    state["files"][file.name] = sha256(file)
    (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))
    with pytest.raises(
        UserError,
        match=r"damaged \(weights.safetensors is not a sound .*step-000002 is intact",
    ):
        loop.train(replace(trained, steps=6), resume=True)
    (folder / "state.json").write_text("[" * 99_999)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        loop.train(replace(trained, steps=6), resume=True)


@pytest.mark.parametrize(
    ("old", "new"), [(b"0.bias.exp_avg_sq", b"9.bias.exp_avg_sq"), (b"0.bias.exp_avg_sq", b"0.bias.exp_avg_xx")]
)
def test_a_forged_optimizer_is_named(trained, old, new):
    folder = Path(trained.out) / "checkpoints" / "step-000004"
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes().replace(old, new))
    state = json.loads((folder / "state.json").read_text())
    del state["self"]
    state["files"][file.name] = sha256(file)
    (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))
    before = contents(Path(trained.out))
    with pytest.raises(UserError, match=rf"has {new.decode()} \[16\], which does not fit the trained weights"):
        loop.train(replace(trained, steps=6), resume=True)
    assert contents(Path(trained.out)) == before


@pytest.mark.parametrize(
    "change",
    [
        {"step": 3},
        {"step": "4"},
        {"skipped": -1},
        {"seconds": None},
        {"metrics_bytes": 1.5},
        {"changes": {}},
        {"nonfinite_batches": True},
        {"seconds": float("inf")},
    ],
)
def test_a_forged_state_is_named(trained, change):
    file = Path(trained.out) / "checkpoints" / "step-000004" / "state.json"
    state = json.loads(file.read_text()) | change
    del state["self"]
    file.write_text(json.dumps(state | {"self": digest(state)}))
    with pytest.raises(UserError, match=rf"damaged \(state.json (says {next(iter(change))}|records step 3)"):
        loop.train(replace(trained, steps=6), resume=True)


def test_lost_metrics_are_named_and_may_be_given_up(trained):
    path = Path(trained.out) / "metrics.jsonl"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"metrics.jsonl: the checkpoint was saved when this file had \d+ bytes"):
        loop.train(replace(trained, steps=6), resume=True)
    path.unlink()
    loop.train(replace(trained, steps=6), resume=True)
    assert [m["step"] for m in read_metrics(Path(trained.out))] == [5, 6]


def test_changed_settings_are_listed_allowed_and_remembered(trained, recipe_file, capsys):
    changed = replace(trained, learning_rate=0.5, steps=6)
    (Path(trained.out) / "run.json").write_text(dumps(changed))
    words = ["resume", trained.out, "--plugin", str(recipe_file)]
    before = contents(Path(trained.out))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "learning_rate: 0.01 -> 0.5" in said and f"`leapalign resume {trained.out} --allow-changes`" in said
    assert contents(Path(trained.out)) == before
    assert main([*words, "--allow-changes"]) == 0
    assert "with changed settings:\n  learning_rate: 0.01 -> 0.5" in capsys.readouterr().err
    state = checkpoints.find(changed).state
    assert state["changes"] == [{"step": 4, "changes": ["learning_rate: 0.01 -> 0.5"]}]
    assert loop.train(replace(changed, steps=7), resume=True).engine.run.learning_rate == 0.5  # and is now the run's


def test_another_model_is_refused_though_changes_are_allowed(trained, monkeypatch):
    found = checkpoints.find(trained)
    engine = loop.build(trained)
    other = dict(engine.parameters)
    other["0.bias"] = other["0.bias"][:3]
    with pytest.raises(UserError, match=r"0.bias is \[16\] in the checkpoint, \[3\] in the model"):
        checkpoints.restore(found, other, engine.ema.shadow, engine.optimizer)


def test_other_versions_are_told(trained, monkeypatch, capsys):
    newer = versions() | {"torch": "9.9"}
    monkeypatch.setattr(session, "versions", lambda: newer)
    loop.train(replace(trained, steps=5), resume=True)
    assert "other versions, so numbers may differ in the last bits: torch: " in capsys.readouterr().err


def test_more_than_a_million_steps_are_in_order(tiny_run):
    run = tiny_run()
    for step in (999_999, 1_000_000, 2):
        (Path(run.out) / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (Path(run.out) / "checkpoints" / "step-latest").mkdir()
    assert [p.name for p in checkpoints.complete(run)] == ["step-000002", "step-999999", "step-1000000"]


def test_a_link_in_the_folder_cannot_lead_writing_out_of_it(trained, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "step-000009").mkdir()
    for name in ("metrics.jsonl", "checkpoints/step-000009", "pipeline"):
        link = Path(trained.out) / name
        if link.exists():
            link.rename(link.with_name("moved"))
        link.symlink_to(outside / "step-000009")
        with pytest.raises(UserError, match=f"{name} is a link to {outside}"):
            loop.train(replace(trained, steps=6), resume=True)
        link.unlink()
        if link.with_name("moved").exists():
            link.with_name("moved").rename(link)
    assert list(outside.rglob("*")) == [outside / "step-000009"]
    (Path(trained.out) / "inside").symlink_to("checkpoints")
    refuse_links_out(Path(trained.out))


def test_the_out_of_a_foreign_run_json_is_not_where_resume_writes(trained, tmp_path, recipe_file):
    record = json.loads((Path(trained.out) / "run.json").read_text())
    (Path(trained.out) / "run.json").write_text(
        json.dumps(record | {"out": str(tmp_path / "victim"), "name": "../../x"})
    )
    assert main(["resume", trained.out, "--plugin", str(recipe_file), "--steps", "5"]) == 0
    assert not (tmp_path / "victim").exists() and not (tmp_path / "x").exists()
    assert json.loads((Path(trained.out) / "summary.json").read_text())["steps"] == 5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), r"/x/y: the disk is full \(\d+ MiB are free\); do this"),
        (OSError(30, "Read-only file system"), "the file system is read-only; do this"),
        (PermissionError(13, "Permission denied", "/x"), "/x: writing is not permitted; do this"),
        (OSError(122, "Disk quota exceeded"), "the disk quota is used up"),
    ],
)
def test_what_disks_refuse_is_a_sentence(tmp_path, error, words):
    with pytest.raises(UserError, match=words), disk_errors(tmp_path, "do this"):
        raise error
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path, "do this"):
        raise FileNotFoundError(2, "No such file or directory")


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) -> a small file system of its own; skips where mounting is not allowed."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(folders)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a tmpfs needs root")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_full_disk(tiny_run, tmp_path, mounted):
    """The third checkpoint finds no room; the second one is whole, and with room the run goes on exactly."""
    disk = mounted("size=1m")
    run = tiny_run(out=str(disk / "run"), steps=8, keep_checkpoints=9)

    def fill(metrics):
        if metrics["step"] == 5:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()  # step 4's is to find room
            left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "ballast").write_bytes(b"x" * (left - 12_000))

    with pytest.raises(UserError, match=r"the disk is full \(\d+ MiB are free\); make room, then `leapalign resume"):
        loop.train(run, on_step=fill)
    assert [p.name for p in checkpoints.complete(run)] == ["step-000002", "step-000004"]
    assert checkpoints.find(run).folder.name == "step-000004"
    (disk / "ballast").unlink()
    loop.train(run, resume=True)
    whole = replace(run, out=str(tmp_path / "whole"))
    loop.train(whole)
    assert weights(run) == weights(whole)


def test_a_real_read_only_folder(tiny_run, mounted):
    disk = mounted("size=2m")
    run = tiny_run(out=str(disk / "run"))
    loop.train(run)
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match="the file system is read-only"):
        loop.train(replace(run, steps=6), resume=True)
    with pytest.raises(UserError, match="cannot make the run's folder"):
        loop.train(replace(run, out=str(disk / "other")))
    assert contents(disk) == before

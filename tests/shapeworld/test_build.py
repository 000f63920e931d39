"""What the embedded reward learns from is what it should be; an interrupted build goes on; the command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from leapalign.geneval.rules import judge
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import MAX_OBJECTS, render
from leapalign.studies.shapeworld_build import __main__ as command
from leapalign.studies.shapeworld_build import generator as build_generator
from leapalign.studies.shapeworld_build.between import between, edited
from leapalign.studies.shapeworld_build.clip import JUDGE, NEGATIVES, REWARD, Batch, Trainee, contrast
from leapalign.studies.shapeworld_build.generator import Lesson, train_generator
from leapalign.studies.shapeworld_build.harden import attacked, hard_loss
from leapalign.studies.shapeworld_build.parts import Build, make
from leapalign.studies.shapeworld_build.progress import flat_then_decay
from leapalign.studies.shapeworld_build.scenes import SLOPPY, STRICT
from leapalign.studies.shapeworld_build.text import clip_tokenizer, t5_tokenizer
from leapalign.studies.shapeworld_build.vae import new_vae


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.make(120, np.random.default_rng(0))


def found(images: torch.Tensor) -> list[list[tuple]]:
    """The shapes and colours that the rule-based judge sees in each picture."""
    return [sorted((d.label, d.color) for d in each) for each in detect(images)]


def test_an_edit_is_one_change_and_false_where_the_judge_says_so(batch):
    """GenEval's rules see a missing thing, a wrong count, colour or place; they do not mind one thing more."""
    rng = np.random.default_rng(1)
    edits = [edited(caption, scene, rng) for caption, scene in zip(batch.captions, batch.scenes)]
    for scene, (other, _) in zip(batch.scenes, edits):
        assert 1 <= len(set(scene) ^ set(other)) <= 4 and len(other) <= MAX_OBJECTS
    verdicts = [judge(c, d).correct for c, d in zip(batch.captions, detect(render([scene for scene, _ in edits])))]
    more = [len(other) > len(scene) for scene, (other, _) in zip(batch.scenes, edits)]
    agree = [right != false for right, (_, false), extra in zip(verdicts, edits, more) if not extra]
    assert np.mean(agree) > 0.95 and len(agree) > 180
    assert len({false for _, false in edits}) == 2


def test_pictures_between_are_neither_end_and_bad_ones_are_bad_to_the_judge(batch):
    middle = between(batch.captions, batch.scenes, np.random.default_rng(2))
    clean = torch.from_numpy(render(batch.scenes))
    assert middle.images.shape == clean.shape and middle.images.min() >= 0 and middle.images.max() <= 1
    assert not (middle.false & middle.bad).any() and ((middle.share >= 0) & (middle.share <= 1)).all()
    assert middle.false.float().mean() > 0.4 and middle.bad.float().mean() > 0.15
    wanted = [sorted((o.shape, o.color) for o in scene) for scene in batch.scenes]
    assert np.mean([a == b for a, b in zip(found(clean), wanted)]) > 0.97
    assert np.mean([a == b for a, b, bad in zip(found(middle.images), wanted, middle.bad) if bad]) < 0.35
    near = (middle.images - clean).square().sum((1, 2, 3)) < (middle.images - middle.ends).square().sum((1, 2, 3))
    agree = (near == (middle.share > 0.5))[middle.false & ((middle.share - 0.5).abs() > 0.2)]
    assert agree.float().mean() > 0.95


def test_contrast_counts_false_pictures_and_leaves_out_what_never_counts():
    logits, wrong = torch.eye(3) * 4, torch.zeros(3, 2)
    plain = contrast(logits, wrong)
    torch.testing.assert_close(contrast(logits, wrong, torch.full((3, 2), -1e4)), plain)
    assert contrast(logits, wrong, torch.full((3, 2), 4.0)) > plain + 0.5


@pytest.mark.parametrize("size", [REWARD, JUDGE], ids=["reward", "judge"])
def test_an_attack_has_its_length_and_goes_uphill(size):
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    batch, model = Batch.make(4, rng), Trainee(size).eval()
    middle = between(batch.captions[:4], batch.scenes[:4], rng)
    images = torch.cat([torch.from_numpy(render(batch.scenes)), middle.ends, middle.images])
    with torch.no_grad():
        (text, layout_read), (wrong, _) = model.read(batch.captions), model.read(batch.misses)
    assert len(batch.misses) == NEGATIVES * len(batch.captions) and len(batch.scenes) == 8

    def loss(x: torch.Tensor) -> torch.Tensor:
        return hard_loss(model, batch, middle, text, layout_read, wrong, x)

    moved = attacked(images, torch.full((16, 1, 1, 1), 0.3), loss)
    assert (moved - images).flatten(1).norm(dim=1).max() <= 0.3 + 1e-5
    assert (moved - images)[:8].flatten(1).norm(dim=1).min() > 0.1  # clamping to [0, 1] takes a part of it
    assert loss(moved) > loss(images)
    assert torch.equal(attacked(images, torch.zeros(16, 1, 1, 1), loss), images)


def test_scenes_of_a_batch_are_true_of_their_captions():
    batch = Batch.make(20, np.random.default_rng(4))
    detections = detect(render(batch.scenes))
    verdicts = [judge(caption, found).correct for found, caption in zip(detections, batch.captions)]
    assert np.mean(verdicts) > 0.9
    assert not batch.skip.diagonal().any()


def test_the_tokenizers_are_the_same_at_every_call():
    """Or a build that goes on would find its text encoders' ids shuffled."""
    first, *others = [(clip_tokenizer(), t5_tokenizer()) for _ in range(5)]
    text = "a photo of an orange ring left of a cross and xylophones"
    for pair in others:
        for mine, yours in zip(pair, first, strict=True):
            assert mine.get_vocab() == yours.get_vocab()
            assert mine(text)["input_ids"] == yours(text)["input_ids"]


def test_a_part_that_is_done_is_not_made_again(tmp_path):
    made = []
    for _ in range(2):
        make(tmp_path, "vae", "abc123", lambda: made.append("vae"))
    assert made == ["vae"]
    assert json.loads((tmp_path / "vae.json").read_text())["commit"] == "abc123"


def test_a_part_that_fails_is_not_done(tmp_path):
    def fail() -> None:
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        make(tmp_path, "vae", "abc123", fail)
    assert not (tmp_path / "vae.json").exists()


def test_an_interrupted_generator_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed in the second lesson, after a state was written in the first: the rest is as if nothing had happened."""
    lessons = (Lesson(3, SLOPPY, 0, 0.0), Lesson(5, STRICT, 1, 1.0))
    monkeypatch.setattr(build_generator, "LESSONS", lessons)
    monkeypatch.setattr(build_generator, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    vae = new_vae().eval().requires_grad_(False)
    train = partial(train_generator, vae=vae, steps=5, seed=3, num=32, batch=4)
    train(tmp_path / "whole")

    def killed(_optimizer, _lr, step, _steps) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build_generator, "flat_then_decay", lambda *args: killed(*args) or flat_then_decay(*args))
        train(tmp_path / "parts")
    torch.manual_seed(99)  # a new process has another one
    train(tmp_path / "parts")
    for part in ("transformer", "text_encoder", "text_encoder_3"):
        whole, parts = (weights(tmp_path / name / part) for name in ("whole", "parts"))
        assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items()), part


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc whether a process lives")
def test_a_killed_build_leaves_no_process_behind(tmp_path):
    script = (
        "import os, time\n"
        "from leapalign.studies.shapeworld_build.parts import workers\n"
        "if __name__ == '__main__':\n"
        "    with workers() as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    (tmp_path / "build.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "build.py"], stdout=subprocess.PIPE, text=True) as build:
        assert build.stdout is not None
        worker = int(build.stdout.readline())
        os.kill(worker, 0)  # alive
        build.kill()
        build.wait()
    deadline = time.monotonic() + 60
    while _alive(worker):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """A process that has ended may still be listed where nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_the_command_makes_all_parts_with_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PER_TASK", 1)
    monkeypatch.setattr(command.measure, "reward_accuracy", partial(command.measure.reward_accuracy, num=2))
    steps = {f"{part}_steps": 2 for part in ("vae", "generator", "reward", "hardening", "judge")}
    command.main(Build(out=tmp_path, **steps))
    for name in ("generator", "reward", "judge"):
        assert "2 steps" in (tmp_path / name / "README.md").read_text()
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"generator", "reward", "judge"}
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "generator")

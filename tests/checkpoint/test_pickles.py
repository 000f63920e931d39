"""Pickles from outside: refused wherever a file is looked for, and the code in them never runs."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_pipelines
from leapalign.errors import UserError
from leapalign.models.sd3 import SD3
from leapalign.rewards.clip import PickScore
from leapalign.rewards.imagereward import ImageReward
from leapalign.training import loop
from tiny_clip import write_tiny_clip

SOURCE = Path(__file__).parents[2] / "src"


class Bomb:
    """Unpickled, it writes a file: in a process that opens it, that file is there afterwards."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path):
    """The folder that a bomb would make; the bomb is live, and no test may set it off."""
    alive = tmp_path / "alive"
    pickle.loads(pickle.dumps(Bomb(alive)))
    assert alive.is_dir()
    proof = tmp_path / "it-ran"
    yield proof
    assert not proof.exists()


def bomb(file: Path, proof: Path, kind: str = "plain") -> Path:
    """As a bare pickle, as torch.save's archive, and with honest tensors beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "plain":
        file.write_bytes(pickle.dumps(Bomb(proof)))
    elif kind == "legacy":
        torch.save({"w": torch.zeros(1), "x": Bomb(proof)}, file, _use_new_zipfile_serialization=False)
    else:
        torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Bomb(proof)}, file)
        assert zipfile.is_zipfile(file)
    return file


@pytest.mark.parametrize("kind", ["plain", "legacy", "archive"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_reward_of_one_file(tmp_path, proof, kind, suffix):
    file = bomb(tmp_path / f"ImageReward{suffix}", proof, kind)
    with pytest.raises(UserError):
        ImageReward(path=str(file)).load("cpu", "float32")


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_a_reward_folder(tmp_path, proof, kind):
    folder = tmp_path / "clip"
    write_tiny_clip(folder)
    (weights,) = folder.glob("*.safetensors")
    bomb(folder / "pytorch_model.bin", proof, kind)
    PickScore(path=str(folder)).load("cpu", "float32")  # safetensors are there: the other file is not opened
    weights.unlink()
    with pytest.raises(UserError):
        PickScore(path=str(folder)).load("cpu", "float32")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pipeline_folder(tmp_path, proof, part):
    folder = tmp_path / "sd3"
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=False), folder)
    (weights,) = (folder / part).glob("*.safetensors")
    bomb(weights.with_suffix(".bin"), proof, "archive")
    bomb(folder / part / "pytorch_model.bin", proof)
    config = SD3(path=str(folder), height=16, width=16, max_sequence_length=0)
    model = config.load("cpu", "float32")
    model.prepare(["a red circle"])
    model.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="pickled weights are not opened"):
        config.load("cpu", "float32")
    bomb(weights, proof)  # a pickle by the name of safetensors
    with pytest.raises(UserError, match="not a readable safetensors file"):
        config.load("cpu", "float32")


def test_a_checkpoint(tiny_run, proof):
    run = tiny_run()
    loop.train(run)
    folder = Path(run.out) / "checkpoints" / "step-000004"
    for name in ("weights.pt", "optimizer.bin"):
        file = bomb(folder / name, proof, "archive")
        with pytest.raises(UserError, match=f"{name} is not part of a checkpoint; pickled files are never opened"):
            loop.train(replace(run, steps=6), resume=True)
        file.unlink()
    for name in ("weights", "ema", "optimizer"):
        kept = folder / f"{name}.kept"
        shutil.move(folder / f"{name}.safetensors", kept)
        bomb(folder / f"{name}.safetensors", proof)
        with pytest.raises(UserError, match=f"{name}.safetensors was changed after it was written"):
            loop.train(replace(run, steps=6), resume=True)
        shutil.move(kept, folder / f"{name}.safetensors")
    bomb(Path(run.out) / "checkpoints" / "step-000005.pt", proof)  # beside the checkpoints: not looked at
    assert loop.train(replace(run, steps=6), resume=True).summary["steps"] == 6


def test_the_source_never_trusts_code_from_outside():
    """No trust_remote_code, no unpickling, torch.load with weights_only=True alone; strings and comments count."""
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert len(texts) > 80
    for path, text in texts.items():
        assert "trust_remote_code" not in text, path
        assert not re.search(r"\bpickle\.(load|Unpickler)|\b(joblib|dill|shelve|marshal)\b|allow_pickle=True", text), (
            path
        )
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"

"""`leapalign verify` of rewards: good ones, spoiled ones, and what the paper's models score with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub_cache import lay_out
from leapalign.cli import main
from leapalign.rewards.clip import PickScore
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.verification.checks import Check
from leapalign.verification.files import read_hashes
from leapalign.verification.rewards import check_reward
from tiny_checkpoints import write_tiny_hpsv2
from tiny_clip import write_tiny_clip


def check(config: Any, hashes: Path | None = None) -> list[Check]:
    return check_reward(config.name, config, "cpu", "float32", read_hashes(str(hashes)) if hashes else None)


def differing(checks: list[Check]) -> dict[tuple[str, str], str]:
    return {(c.part, c.check): c.came for c in checks if c.state == "different"}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_tiny_clip(tmp_path / "clip")


def change(folder: Path, **weights: Any) -> None:
    """A tensor for a key, or None to take it away."""
    file = folder / "model.safetensors"
    content = load_file(file)
    for key, value in weights.items():
        key = key.replace("__", ".")
        content.pop(key)
        if value is not None:
            content[key] = value
    save_file(content, file)


def test_good_reward_by_the_command(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"pickscore={clip}", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "reward" and answer["good"]
    states = {(c["part"], c["check"]): c["state"] for c in answer["checks"]}
    assert {states["pickscore.path", what] for what in ("files", "keys and shapes", "number types", "values")} == {
        "good"
    }
    for what in ("opens", "scores of drawn images", "tensors' and files' scores", "gradient at the image"):
        assert states["pickscore", what] == "good"
    told = " ".join(c["came"] for c in answer["checks"] if c["part"] == "paper")
    assert (
        "FLUX.1-dev: pickscore logit 22.7902 (Table 2" in told
        and "3.5-medium: pickscore logit 22.5189 (Table 4" in told
    )


def test_checkpoint_of_one_file(tmp_path: Path) -> None:
    folder = write_tiny_hpsv2(tmp_path)
    assert not differing(check(HPSv2(path=str(folder), processor="")))
    checks = check(HPSv2(path=str(folder / "HPS_v2.1_compressed.pt"), processor=""))
    assert not differing(checks) and any("0.3078" in c.came for c in checks)
    file = folder / "HPS_v2.1_compressed.pt"
    weights = torch.load(file, weights_only=True)["state_dict"]
    torch.save({**weights, "visual.proj": weights["visual.proj"] * float("nan")}, file)
    found = differing(check(HPSv2(path=str(folder), processor="")))
    assert found["hpsv2.path", "values"] == "NaN or infinity in visual.proj"
    assert ("hpsv2", "scores") in found
    del weights["visual.proj"]
    torch.save(weights, file)
    assert "visual_projection.weight" in differing(check(HPSv2(path=str(folder), processor="")))["hpsv2", "opens"]
    file.write_bytes(file.read_bytes()[:1000])
    assert differing(check(HPSv2(path=str(folder), processor=""))).keys() == {
        ("hpsv2", "opens"),
        ("hpsv2.path", "files"),
    }


def test_safetensors_of_one_file(tmp_path: Path) -> None:
    folder = write_tiny_hpsv2(tmp_path)
    old = folder / "HPS_v2.1_compressed.pt"
    file = folder / "model.safetensors"
    save_file(torch.load(old, weights_only=True)["state_dict"], file)
    old.unlink()
    assert not differing(check(HPSv2(path=str(folder), processor="")))
    file.write_bytes(file.read_bytes()[:-1])
    found = differing(check(HPSv2(path=str(folder), processor="")))
    assert "its header announces" in found["hpsv2.path", "files"]


def test_spoiled_folders(clip: Path) -> None:
    change(clip, visual_projection__weight=None)
    found = differing(check(PickScore(path=str(clip))))
    assert found["pickscore.path", "keys"] == "1 missing: visual_projection.weight" and ("pickscore", "opens") in found


def test_no_gradient_and_scores_that_are_all_the_same(clip: Path) -> None:
    width = load_file(clip / "model.safetensors")["visual_projection.weight"].shape
    change(clip, visual_projection__weight=torch.zeros(width))
    found = differing(check(PickScore(path=str(clip))))
    assert ("pickscore", "scores") in found  # 0 / 0


def test_reward_without_a_gradient_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def same(images, prompts):\n    return images.new_tensor([1.0 for _ in prompts])\n"
        "def mean(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    assert main(["verify", f"{file}:same", "--json"]) == 1
    checks = [Check(**record) for record in json.loads(capsys.readouterr().out)["checks"]]
    assert differing(checks).keys() == {("custom", "scores of drawn images"), ("custom", "gradient at the image")}
    assert main(["verify", f"{file}:mean", "--json"]) == 0


def test_preprocessing_that_differs_between_tensors_and_files(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leapalign.rewards.clip.model import ClipReward

    monkeypatch.setattr(ClipReward, "score_pil", lambda self, pictures, prompts: self(
        torch.rand(len(pictures), 3, 24, 24), prompts).detach())  # fmt: skip
    assert ("pickscore", "tensors' and files' scores") in differing(check(PickScore(path=str(clip))))


def test_hashes_of_a_list_and_of_the_hub(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums").write_text("0" * 64 + "  model.safetensors\n")
    found = differing(check(PickScore(path=str(clip)), tmp_path / "sums"))
    assert found["pickscore.path", "hash"].startswith("model.safetensors has ")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = lay_out(clip, tmp_path / "hub", "org/clip")
    checks = check(PickScore(path=str(snapshot)))
    assert not differing(checks) and any(c.expected == "those that the hub recorded" for c in checks)
    (snapshot / "config.json").resolve().write_text((clip / "config.json").read_text() + "\n")
    assert ("pickscore", "hash") in differing(check(PickScore(path="org/clip", processor=str(clip))))

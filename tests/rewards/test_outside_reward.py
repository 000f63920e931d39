"""A complete reward in a user's file outside the package: every command knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from leapalign.cli import main
from leapalign.codec import encode
from leapalign.recipes import RECIPES
from leapalign.training.tracking import read_metrics

FILE = '''"""A reward of two convolutions, whose weights are one file, and a text table that reads four words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leapalign.rewards.base import DescribedReward, Reward, Source, Weightless, check_inputs

WORDS = 4


def network():
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 1, 3))


@dataclass(frozen=True, kw_only=True)
class Outside(DescribedReward):
    """Two convolutions, more for prompts with many words."""

    name: ClassVar[str] = "outside"

    weights: str = {weights!r}
    gain: float = 1.0

    def load(self, device: str = "cpu", dtype: str = "float32") -> Loaded:
        from safetensors.torch import load_file

        model = network()
        model.load_state_dict(load_file(self.weights))
        return Loaded(model.to(device).requires_grad_(False).eval(), self.gain)

    def sources(self) -> tuple[Source, ...]:
        return (Source(field="weights", path=self.weights),)

    def weightless(self) -> Weightless:
        return Weightless(make=lambda: Loaded(network(), self.gain), score=lambda r, x: r.model(x).mean((1, 2, 3)))


@dataclass(frozen=True)
class Loaded(Reward):
    model: object
    gain: float

    def __call__(self, images, prompts):
        check_inputs("outside", images, prompts)
        words = images.new_tensor([min(WORDS, len(prompt.split())) for prompt in prompts])
        return self.gain * self.model(images).mean((1, 2, 3)) * (1 + words)

    def score_pil(self, images, prompts):
        import torch

        from leapalign.images import to_tensor

        with torch.no_grad():
            return torch.cat([self(to_tensor(i.convert("RGB"))[None], [p]) for i, p in zip(images, prompts)])

    def network(self):
        return self.model

    def longer(self, prompts):
        from leapalign.storage.token_limits import TooLong

        return TooLong(count=sum(len(prompt.split()) > WORDS for prompt in prompts), limit=WORDS)
'''
BYTES = 4 * (3 * 4 * 9 + 4 + 4 * 9 + 1)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = {"0.weight": torch.randn(4, 3, 3, 3), "0.bias": torch.randn(4)}
    weights |= {"2.weight": torch.randn(1, 4, 3, 3), "2.bias": torch.randn(1)}
    save_file(weights, tmp_path / "outside.safetensors")
    file = tmp_path / "outside_reward.py"
    file.write_text(FILE.replace("{weights!r}", repr(str(tmp_path / "outside.safetensors"))))
    return file


@pytest.fixture
def run_json(tmp_path: Path, plugin: Path) -> Path:
    """The embedded recipe, small, with the outside reward in the place of its own."""
    record = encode(RECIPES["shapeworld-leapalign"]())
    record |= {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "num_sampling_steps": 4, "checkpoint_every": 1}
    record |= {"evaluate_every": 1, "evaluation_size": 2, "out": str(tmp_path / "run"), "device": "cpu"}
    record["rewards"][0] |= {"reward": {"type": f"{plugin.name}:Outside", "gain": 2.0}, "threshold": 100.0}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(record))
    return file


def called(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    capsys.readouterr()
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def test_every_command_knows_it(plugin: Path, run_json: Path, tmp_path: Path, capsys: Any) -> None:
    run, given = tmp_path / "run", ("--plugin", plugin)
    plan = json.loads(called(capsys, "train", run_json, *given, "--dry-run", "--json")[0])
    assert plan["memory"]["rewards"] == BYTES and not any("outside" in note for note in plan["notes"])

    _, err = called(capsys, "train", run_json, *given)
    assert "the reward outside reads 4 tokens of a prompt" in err
    assert read_metrics(run)[-1]["reward"] != 0

    called(capsys, "resume", run, *given, "--steps", "2")
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2]
    assert json.loads((run / "run.json").read_text())["rewards"][0]["reward"]["gain"] == 2.0

    out, err = called(capsys, "evaluate", run, *given, "--per-task", "1", "--steps", "2", "--json")
    table = json.loads(out)
    assert err.count("the reward outside reads 4 tokens") == 1
    assert table["rewards"]["outside"]["num"] == 6

    called(capsys, "export", run, *given, "--out", tmp_path / "exported")
    assert (tmp_path / "exported").is_dir()

    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    out, err = called(capsys, "score", tmp_path / "red.png", "--reward", f"{plugin}:Outside", "--prompt", "a b c d e",
                      "--device", "cpu", "--json")  # fmt: skip
    assert list(json.loads(out)[0]["scores"]) == [f"{plugin}:Outside"] and "1 of 1 prompts are longer" in err

    checks = json.loads(called(capsys, "verify", f"{plugin}:Outside", "--json")[0])["checks"]
    assert {c["state"] for c in checks} <= {"good", "note"}
    assert ("outside.weights", "values") in {(c["part"], c["check"]) for c in checks}


def test_without_the_file_the_remedy_is_named(run_json: Path, capsys: Any) -> None:
    assert main(["train", str(run_json)]) == 2
    assert "--plugin path/to/outside_reward.py" in " ".join(capsys.readouterr().err.split())

"""`leapalign cache`: what is there, and nothing of anybody else's is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from leapalign.cli import main
from leapalign.models.base import Text
from leapalign.models.prompt_embeds.store import PromptStore
from leapalign.storage.pipeline_folder import PipelineFolder


def test_show_and_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path))
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").touch()
    folder = PipelineFolder(path=Path("some/model"), components={})
    store = PromptStore(root=tmp_path, limit=10**9, folder=folder, components=(), settings={"dtype": "bfloat16"})
    store.write("a red circle", Text(torch.ones(1, 2, 3)))
    store.write("green", Text(torch.ones(1, 2, 3)))
    assert main(["cache", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["place"] == str(tmp_path) and answer["limit"] == 100 * 10**9
    assert [(model["model"], model["prompts"]) for model in answer["models"]] == [("some/model", 2)]
    assert answer["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) > 0
    assert main(["cache", "--clear"]) == 0
    out = capsys.readouterr().out
    assert "2 prompts" in out and "dtype bfloat16" in out and out.endswith("removed\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["others", "thesis.txt"]
    assert main(["cache"]) == 0 and "0 GB of at most 100 GB" in capsys.readouterr().out

"""Prompts longer than what a text encoder reads: counted with the encoder's own tokenizer, and told once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_pipelines
from leapalign.cli import main
from leapalign.models.base import Text
from leapalign.models.pipeline import PipelineModel
from lora_families import FAMILIES

LONG = "a red circle " * 60
EXPECTED = {  # family -> tokens that its encoders read; CLIP's tiny tokenizer reads 12
    "sd3": ["text_encoder reads 12", "text_encoder_2 reads 12", "text_encoder_3 reads 5"],
    "flux": ["text_encoder reads 12", "text_encoder_2 reads 5"],
    "flux2": ["text_encoder reads 24"],
    "qwen-image": ["text_encoder reads 30"],
    "z-image": ["text_encoder reads 40"],
}


def tensors(text: Text) -> Any:
    return [t for t in (text.tokens, text.pooled) if t is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_told_is_what_is_not_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Two long prompts that differ in their last word alone have equal embeds: that is what the lines are about."""
    folder = tiny_pipelines.save(FAMILIES[name].build(), tmp_path)
    model: PipelineModel = FAMILIES[name].config(folder).load("cpu", "float32")
    capsys.readouterr()
    model.tell_longer(["a", LONG + "star", LONG + "square", LONG + "star"])
    lines = capsys.readouterr().err.splitlines()
    told = [line.removeprefix("the model's ").partition(" tokens of a prompt: ")[0] for line in lines]
    assert told == EXPECTED[name]
    assert all(line.endswith("2 of 3 prompts are longer and are truncated") for line in lines)
    model.encode([LONG + "star"])
    assert "longer" not in capsys.readouterr().err  # once is enough
    fresh: PipelineModel = FAMILIES[name].config(folder).load("cpu", "float32")
    capsys.readouterr()
    fresh.encode([LONG])
    assert capsys.readouterr().err.count("1 of 1 prompts are longer") == len(EXPECTED[name])  # a library's user too
    star, square = (model.encode([LONG + word]).prompts for word in ("star", "square"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(star), tensors(square)))
    assert "truncated" not in capsys.readouterr().err + caplog.text  # diffusers says it no more for every batch


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "z-image"])
def test_the_limit_is_exact(name: str, tmp_path: Path) -> None:
    """One token decides; and the count is that of the embeds."""
    config = FAMILIES[name].config(tiny_pipelines.save(FAMILIES[name].build(), tmp_path))
    model = replace(config, max_sequence_length=48).load("cpu", "float32")
    prompt = "two blue star left of the green square"
    (reader,) = model.readers(model.folder)
    length = reader.longest([prompt])
    row = model.encode([prompt]).prompts
    if row.mask is not None:  # FLUX.2's are filled up
        assert row.tokens.shape[1] == length
    assert [replace(reader, limit=length - more).longer([prompt]).count for more in (0, 1)] == [0, 1]


def test_a_sample_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sd3_pipeline(), tmp_path / "sd3")
    words = ["sample", folder, "--prompt", LONG, "--size", "16", "--steps", "1", "--out", str(tmp_path / "images")]
    assert main([*words, "--device", "cpu"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "prompts are longer" in line]
    assert len(told) == 2  # both CLIPs; T5 reads 256 tokens

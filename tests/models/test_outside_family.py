"""A complete model family in a user's file outside the package: every command knows it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

import outside_family
import tiny_pipelines as tiny
from leapalign.cli import main
from leapalign.codec import encode
from leapalign.models import FAMILIES
from leapalign.models.base import Family
from leapalign.models.prompt_embeds import store
from leapalign.recipes import RECIPES
from leapalign.training.tracking import read_metrics

PROMPTS = ("a red circle", "a blue square left of a green star")
REWARD = ("--reward", "pickscore=embedded:judge")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The file, with the random pipeline and the prompts that its recipe expects beside it."""
    pipeline = AuraFlowPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny.randomise(UMT5EncoderModel(UMT5Config(**outside_family.TEXT_ENCODER)), 1),
        vae=tiny.randomise(AutoencoderKL(**outside_family.VAE), 2),
        transformer=tiny.randomise(AuraFlowTransformer2DModel(**outside_family.TRANSFORMER), 3, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    tiny.save(pipeline, tmp_path / "aura")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return Path(shutil.copy(outside_family.__file__, tmp_path / "aura_flow.py"))


def called(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    capsys.readouterr()
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert status == 0, out + err
    return out, err


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return json.loads(called(capsys, *argv, "--json")[0])


def test_it_has_all_of_a_family_and_is_not_built_in() -> None:
    assert isinstance(outside_family.AuraFlow(path="aura"), Family)
    assert outside_family.AuraFlow.pipeline not in {family.pipeline for family in FAMILIES}


def test_the_plan_knows_it(plugin: Path, capsys: Any) -> None:
    plan = answer(capsys, "train", f"{plugin}:recipe", "--dry-run")
    weights = {folder: load_file(next((plugin.parent / "aura" / folder).glob("*.safetensors")))
               for folder in ("transformer", "vae", "text_encoder")}  # fmt: skip
    numbers = {folder: sum(tensor.numel() for tensor in tensors.values()) for folder, tensors in weights.items()}
    assert numbers.items() <= plan["parameters"].items()
    assert plan["prompts"] == {"number": 2, "bytes_each": 8 * 32 * 4, "bytes": 2 * 8 * 32 * 4, "limit": 0}
    assert plan["geometry"]["branches"] == 2 and not plan["notes"]

    published = answer(capsys, "train", f"{plugin}:recipe", "--dry-run", "--model.path", "somebody/tiny-aura")
    assert published["parameters"] == plan["parameters"] and published["memory"] == plan["memory"]
    assert {d["what"]: d["bytes"] for d in published["downloads"]} == {n: 4 * many for n, many in numbers.items()}

    sharded = answer(capsys, "train", f"{plugin}:recipe", "--dry-run", "--micro-batch-size", "1", "--ranks", "2",
                     "--sharding", "full")  # fmt: skip
    assert sharded["parameters"] == plan["parameters"]
    assert sharded["memory"]["transformer"] < 0.6 * plan["memory"]["transformer"]


def test_every_command_knows_it(plugin: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WORTHWHILE", 1)  # bytes: the tiny text encoder's embeds are kept on disk too
    given, run, exported = ("--plugin", plugin), tmp_path / "run", tmp_path / "exported"
    draw = ("--prompt", PROMPTS[0], "--steps", "2", "--device", "cpu")

    _, err = called(capsys, "train", f"{plugin}:recipe")  # its self-checks compare with diffusers' own AuraFlowPipeline
    assert "the model's text_encoder reads 8 tokens of a prompt: 1 of 2 prompts are longer" in err
    record = json.loads((run / "run.json").read_text())
    assert record["model"]["type"] == "aura_flow.py:AuraFlow"

    called(capsys, "resume", run, *given, "--steps", "3")
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(row["grad_norm"] > 0 for row in rows[1:])

    cached = answer(capsys, "cache")["models"]
    assert [(model["prompts"], model["settings"]["max_sequence_length"]) for model in cached] == [(3, 8)]

    (image,) = answer(capsys, "sample", run, *given, *draw, "--out", tmp_path / "of_run")
    (row,) = answer(capsys, "score", image["path"], *REWARD, "--prompt", PROMPTS[0], "--device", "cpu")
    assert math.isfinite(row["scores"][REWARD[1]])

    table = answer(capsys, "evaluate", run, *given, "--prompts", tmp_path / "prompts.txt", *REWARD, "--steps", "2",
                   "--device", "cpu")  # fmt: skip
    assert table["rewards"][REWARD[1]]["num"] == 2

    called(capsys, "export", run, *given, "--out", exported)
    called(capsys, "export", run, *given, "--format", "lora", "--out", tmp_path / "lora")
    assert_same_tuning(AuraFlowPipeline.from_pretrained(tmp_path / "aura"), tmp_path / "lora", exported)

    (again,) = answer(capsys, "sample", exported, *given, *draw, "--size", "16", "--out", tmp_path / "of_folder")
    with Image.open(image["path"]) as ours, Image.open(again["path"]) as theirs:
        assert ours.size == theirs.size == (16, 16)

    checks = answer(capsys, "verify", exported, *given, "--device", "cpu")["checks"]
    assert {check["state"] for check in checks} <= {"good", "note"}
    assert "the numbers of somebody/tiny-aura" in {check["came"] for check in checks}
    assert "latents, ours and the pipeline's own" in {check["check"] for check in checks}


def assert_same_tuning(pipeline: AuraFlowPipeline, lora: Path, exported: Path) -> None:
    """diffusers' own pipeline with the LoRA file has the weights of the exported pipeline, which are not the base's."""
    base = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    tuned = AuraFlowPipeline.from_pretrained(exported).transformer.state_dict()
    torch.testing.assert_close(dict(pipeline.transformer.state_dict()), dict(tuned))
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[0] for name in changed} == {"joint_transformer_blocks", "single_transformer_blocks"}
    assert {name.split(".")[2] for name in changed} == {"attn", "ff", "ff_context"}


def test_without_the_file_the_remedy_is_named(plugin: Path, tmp_path: Path, capsys: Any) -> None:
    record = encode(RECIPES["shapeworld-leapalign"]())
    record["model"] = {"type": f"{plugin.name}:AuraFlow", "path": str(tmp_path / "aura")}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert main(["train", str(tmp_path / "run.json")]) == 2
    assert "--plugin path/to/aura_flow.py" in " ".join(capsys.readouterr().err.split())

    assert main(["sample", str(tmp_path / "aura"), "--prompt", PROMPTS[0], "--out", str(tmp_path / "images")]) == 2
    assert "--plugin FILE" in " ".join(capsys.readouterr().err.split())

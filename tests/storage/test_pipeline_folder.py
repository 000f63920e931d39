"""Folders: good ones are opened and written whole, spoiled ones give a sentence that says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from leapalign.errors import UserError
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 5}


def load(folder: str | Path, config: Callable[..., Any] = SD3, dtype: str = "float32", **settings: Any) -> Any:
    return config(path=str(folder), **{**SIZE, **settings}).load("cpu", dtype)


@pytest.fixture
def copy(sd3_folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "copy"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- what cannot be opened


def truncate(folder: Path) -> None:
    file = folder / "text_encoder_3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def garbage(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"<!DOCTYPE html> not found" * 9)


def empty(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")


def drop_a_weight(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file)


def other_shape(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", num_attention_heads=3)


def broken_json(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{")


def no_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def null_component(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder_2=[None, None])


def foreign_library(folder: Path) -> None:
    edit(folder / "model_index.json", vae=["os", "system"])


def pickled(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def only_half_precision(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))


def only_half_precision_in_shards(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bf16-00001-of-00001.safetensors"))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def other_family(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxPipeline")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"proj_out.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def other_scheduler(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])


def stochastic(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", stochastic_sampling=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"text_encoder_3.*has \d+ bytes, its header announces \d+"),
        (garbage, "not a readable safetensors"),
        (empty, "not a readable safetensors"),
        (drop_a_weight, "lacks 1 weights of SD3Transformer2DModel: proj_out.bias"),
        (other_shape, "transformer cannot be opened"),
        (broken_json, r"tokenizer\.json is not readable JSON"),
        (no_component, "lacks the folder vae"),
        (null_component, "names no text_encoder_2"),
        (foreign_library, "comes from 'os'"),
        (pickled, "pickled weights are not opened"),
        (only_half_precision, r"holds only the fp16 variant .*save_pretrained"),
        (only_half_precision_in_shards, r"holds only the bf16 variant"),
        (no_index, "not a diffusers pipeline folder"),
        (other_family, "holds a FluxPipeline, expected a StableDiffusion3Pipeline"),
        (missing_shard, "lacks diffusion_pytorch_model-00002-of-00002.safetensors"),
        (other_scheduler, "scheduler EulerDiscreteScheduler; expected FlowMatch"),
        (stochastic, "stochastic_sampling on"),
    ],
)
def test_spoiled_folder_is_a_users_error(spoil: Callable[[Path], None], message: str, copy: Path) -> None:
    load(copy)  # good before
    spoil(copy)
    with pytest.raises(UserError, match=message):
        load(copy)


def test_text_encoder_that_lacks_a_weight_is_found_when_it_is_opened(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["text_projection.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"text_encoder lacks 1 weights.*text_projection"):
        load(copy).prepare(["green"])


def test_missing_folder_and_hub_id_offline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: folder not found"):
        load(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"owner/no-such-model: HF_HUB_OFFLINE forbids the network.*hf download owner/no-such"
    ):
        load("owner/no-such-model")
    with pytest.raises(UserError, match="embedded:generator"):
        load("embedded:nothing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 18}, "height 18 is not a positive multiple of 4"),
        ({"width": 0}, "width 0 is not a positive multiple of 4"),
        ({"height": 128}, "beyond the position table: at most 64 pixels"),
        ({"max_sequence_length": 0}, "max_sequence_length 0: expected 1 to 512 with T5"),
        ({"max_sequence_length": 513}, "max_sequence_length 513"),
        ({"dtype": "float16"}, "dtype 'float16'; expected one of float32, bfloat16"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, sd3_folder: str) -> None:
    with pytest.raises(UserError, match=message):
        load(sd3_folder, **settings)


def test_flux_settings_that_cannot_work(flux_folder: str) -> None:
    with pytest.raises(UserError, match=r"width 22 is not a positive multiple of 4.*try 24"):
        load(flux_folder, Flux, width=22)
    with pytest.raises(UserError, match="max_sequence_length 0"):
        load(flux_folder, Flux, max_sequence_length=0)


def test_cropped_text_features_are_announced(copy: Path) -> None:
    """diffusers crops CLIP features that do not fit, silently; here CLIP of 8 + 16 into a width of 16."""
    import tiny_pipelines as tiny

    pipeline = tiny.sd3_pipeline(with_t5=False, joint_width=16)
    folder = tiny.save(pipeline, copy / "narrow")
    with pytest.warns(UserWarning, match="CLIP gives 24 features, joint_attention_dim is 16"):
        load(folder).prepare(["green"])


# ---- what is written


def changed(model: Any) -> Any:
    with torch.no_grad():
        for p in model.policy.parameters():
            p.add_(0.01)
    return model


@pytest.mark.parametrize(
    ("folder", "config", "pipeline", "absent"),
    [
        ("sd3_folder", SD3, StableDiffusion3Pipeline, ()),
        ("sd3_without_t5_folder", SD3, StableDiffusion3Pipeline, ("text_encoder_3", "tokenizer_3")),
        ("flux_folder", Flux, FluxPipeline, ()),
    ],
)
def test_saved_folder_opens_in_diffusers_with_the_trained_weights(
    folder: str, config: Any, pipeline: Any, absent: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = Path(request.getfixturevalue(folder))
    model = changed(load(source, config))
    model.save(tmp_path / "tuned")
    opened = pipeline.from_pretrained(tmp_path / "tuned", **dict.fromkeys(absent))
    for name, weight in model.policy.state_dict().items():
        assert torch.equal(opened.transformer.state_dict()[name], weight)
    for file in (f for f in source.rglob("*") if f.is_file() and f.parent.name != "transformer"):
        assert (tmp_path / "tuned" / file.relative_to(source)).read_bytes() == file.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]  # nothing half-written beside it


def test_save_replaces_a_pipeline_folder_and_nothing_else(sd3_folder: str, tmp_path: Path) -> None:
    model = load(sd3_folder)
    model.save(tmp_path / "tuned")
    (tmp_path / "tuned" / "stale.txt").touch()
    changed(model).save(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "stale.txt").exists()
    assert torch.equal(load(tmp_path / "tuned").policy.proj_out.bias, model.policy.proj_out.bias)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt", Path(sd3_folder)):
        with pytest.raises(UserError, match="save elsewhere"):
            model.save(target)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_save_that_breaks_leaves_what_was_there(
    sd3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(sd3_folder)
    model.save(tmp_path / "tuned")
    before = {f: f.read_bytes() for f in (tmp_path / "tuned").rglob("*") if f.is_file()}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        changed(model).save(tmp_path / "tuned")
    assert before == {f: f.read_bytes() for f in (tmp_path / "tuned").rglob("*") if f.is_file()}


def test_half_precision_folder_gets_float32_masters(sd3_folder: str, tmp_path: Path) -> None:
    StableDiffusion3Pipeline.from_pretrained(sd3_folder, torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
    model = load(tmp_path / "half")
    assert {p.dtype for p in model.policy.parameters()} == {torch.float32}
    assert {p.dtype for p in model.decoder.vae.parameters()} == {torch.float32}
    assert model.encode(["green"]).prompts.tokens.dtype == torch.float32


def test_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, leapalign.models.sd3, leapalign.models.flux;"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""The transformer from one file, in diffusers' and in the authors' key names: the same velocity bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import original_layout as original
from leapalign.errors import UserError
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 5}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FAMILIES = {"sd3": (SD3, original.sd3), "flux": (Flux, original.flux)}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[..., Any], Path]:
    """Configuration, its original layout, a tiny folder."""
    original.narrow_flux_converter(monkeypatch, 32)
    return (*FAMILIES[request.param], Path(request.getfixturevalue(f"{request.param}_folder")))


def velocity(model: Any) -> Tensor:
    x = model.noise([torch.Generator().manual_seed(3)])
    with torch.no_grad():
        return model.velocity(model.encode(["a red circle"]))(x, torch.tensor(0.6))


def without_weights(folder: Path, target: Path) -> Path:
    """The folder as it is where the transformer's weights are nowhere but in the file."""
    shutil.copytree(folder, target)
    (target / WEIGHTS).unlink()
    return target


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_layout_gives_the_same_velocity(family: Any, prefix: str, tmp_path: Path) -> None:
    config, translate, folder = family
    weights = {prefix + key: weight for key, weight in translate(load_file(folder / WEIGHTS)).items()}
    assert not weights.keys() & load_file(folder / WEIGHTS).keys() - {
        "context_embedder.weight",
        "context_embedder.bias",
    }
    others = {"vae.decoder.bias": torch.ones(3)} if prefix else {}  # a checkpoint of everything has other parts too
    save_file(weights | others, tmp_path / "model.safetensors")
    bare = without_weights(folder, tmp_path / "bare")
    model = config(path=str(bare), transformer_file=str(tmp_path / "model.safetensors"), **SIZE).load("cpu", "float32")
    assert torch.equal(velocity(model), velocity(config(path=str(folder), **SIZE).load("cpu", "float32")))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.policy.parameters())
    model.save(tmp_path / "saved")
    reopened = config(path=str(tmp_path / "saved"), **SIZE).load("cpu", "float32")
    assert torch.equal(velocity(reopened), velocity(model))


def test_diffusers_layout_in_half_precision(family: Any, tmp_path: Path) -> None:
    config, _, folder = family
    half = {key: weight.bfloat16() for key, weight in load_file(folder / WEIGHTS).items()}
    save_file(half, tmp_path / "half.safetensors")
    model = config(path=str(folder), transformer_file=str(tmp_path / "half.safetensors"), **SIZE).load("cpu", "float32")
    for name, weight in model.policy.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, half[name].float())


def lacking(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight for key, weight in weights.items() if key != "final_layer.linear.bias"}


def extra(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"final_layer.scale_weight": torch.ones(1)}  # as in files that were quantised


def other_shape(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"final_layer.linear.bias": torch.ones(3)}


def other_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"down_blocks.0.weight": torch.ones(3)}


def fewer_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight for key, weight in weights.items() if ".1." not in key.replace("_modulation.1.", "")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, r"cannot be opened as SD3Transformer2DModel .*no 'final_layer.linear.bias'"),
        (extra, r"holds 1 weights for which SD3Transformer2DModel has no place, e.g. final_layer.scale_weight"),
        (other_shape, r"cannot be opened .*proj_out.bias expected shape"),
        (other_model, "cannot be opened as SD3Transformer2DModel"),
        (fewer_layers, r"cannot be opened as .*weights are missing"),
    ],
)
def test_wrong_weights_are_a_users_error(
    spoil: Callable[..., Any], message: str, sd3_folder: str, tmp_path: Path
) -> None:
    save_file(spoil(original.sd3(load_file(Path(sd3_folder) / WEIGHTS))), tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=message):
        SD3(path=sd3_folder, transformer_file=str(tmp_path / "wrong.safetensors"), **SIZE).load("cpu", "float32")


def test_wrong_files_are_a_users_error(sd3_folder: str, tmp_path: Path) -> None:
    def open_file(file: Path) -> None:
        SD3(path=sd3_folder, transformer_file=str(file), **SIZE).load("cpu", "float32")

    with pytest.raises(UserError, match="file not found"):
        open_file(tmp_path / "nowhere.safetensors")
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="pickled weights are not"):
        open_file(tmp_path / "model.ckpt")
    (tmp_path / "half.safetensors").write_bytes((Path(sd3_folder) / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(UserError, match="its header announces"):
        open_file(tmp_path / "half.safetensors")
    whole = str(shutil.copy(Path(sd3_folder) / WEIGHTS, tmp_path / "whole.safetensors"))
    with pytest.raises(UserError, match=r"is a file; a pipeline needs its folder .*transformer_file="):
        SD3(path=whole, **SIZE).load("cpu", "float32")


def test_families_without_a_converter_say_so(sd3_folder: str, tmp_path: Path) -> None:
    from leapalign.storage.single_file import load_single_file

    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="diffusers cannot open a single file as Linear"):
        load_single_file(torch.nn.Linear, tmp_path / "a.safetensors", tmp_path, torch.float32)


@pytest.mark.parametrize(
    "keys",
    [
        ("transformer.blocks.0.to_q.lora_A.weight", "transformer.blocks.0.to_q.lora_B.weight"),  # diffusers
        ("base_model.model.blocks.0.to_q.lora_A.weight", "base_model.model.blocks.0.to_q.lora_B.weight"),  # PEFT
        ("lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.lora_up.weight", "lora_unet_blocks_0_q.alpha"),
    ],
)
def test_a_lora_where_weights_belong_is_named(keys: tuple[str, ...], sd3_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, file)
    for path, given in ((sd3_folder, str(file)), (str(file), "")):
        with pytest.raises(UserError, match=r"lora.safetensors is a LoRA, .*--tuning.start .*lora.safetensors"):
            SD3(path=path, transformer_file=given, **SIZE).load("cpu", "float32")


def test_tuned_pipeline_of_a_run_has_its_own_weights(sd3_folder: str) -> None:
    """A single file that stood for the base's weights must not stand for the tuned ones."""
    config = SD3(path=sd3_folder, transformer_file="base.safetensors", **SIZE)
    assert config.at("tuned") == SD3(path="tuned", **SIZE)
    assert json.loads((Path(sd3_folder) / "model_index.json").read_text())["_class_name"] == SD3.pipeline

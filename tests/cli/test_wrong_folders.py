"""What the fuzz (tests/fuzz) has found in folders of models and rewards, one input each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_pipelines
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.errors import UserError
from leapalign.models.flux2 import _check_layers
from leapalign.models.sd3 import SD3
from leapalign.recipes import shapeworld_leapalign
from leapalign.rewards.clip import PickScore
from leapalign.rewards.imagereward import ImageReward
from leapalign.storage.pipeline_folder import PipelineFolder, read_json, shards_of
from leapalign.storage.safetensors_header import read_header
from tiny_checkpoints import write_tiny_imagereward

CONFIG = {"height": 16, "width": 16, "max_sequence_length": 0}


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "X"}, "not a sound safetensors file"),
        ({"shape": [[1]]}, "not a sound safetensors file"),
        ({"shape": [2**62]}, "not a sound safetensors file"),
        ({"data_offsets": [4, 8]}, "not a sound safetensors file"),
    ],
)
def test_a_header_that_lies(folder, entry, message):
    file = folder / "clip" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    record = json.loads(content[8 : 8 + length])
    read_header(file)
    next(iter(v for k, v in record.items() if k != "__metadata__")).update(entry)
    told = json.dumps(record).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])
    with pytest.raises(ValueError, match=message):
        read_header(file)
    with pytest.raises(UserError, match="has no weights that CLIPModel can read"):
        PickScore(path=str(folder / "clip")).load()


def test_a_link_to_nothing(folder):
    file = folder / "sd3" / "text_encoder_2" / "model.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"model.safetensors cannot be read \(No such file or directory\); copy it again"
    ):
        SD3(path=str(folder / "sd3"), **CONFIG).load("cpu", "float32")


def test_a_folder_in_the_place_of_a_file(folder):
    for file in (folder / "sd3" / "vae" / "config.json", folder / "clip" / "model.safetensors"):
        file.unlink()
        file.mkdir()
    with pytest.raises(UserError, match=r"config.json cannot be read \(Is a directory\)"):
        SD3(path=str(folder / "sd3"), **CONFIG).load("cpu", "float32")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_header(folder / "clip" / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "holds a list, expected an object"), ("[" * 99_999, "not readable JSON"), ("{", "not readable JSON")],
)
def test_settings_that_are_none(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', which is not a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is not a file beside it"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_points_out_of_its_folder(tmp_path, index, message):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        shards_of(file)
    file.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}))
    assert shards_of(file) == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("part", [["diffusers", ["A"]], [None, "A"], [{}, "A"]])
def test_an_index_whose_parts_are_none(folder, part):
    edit(folder / "sd3" / "model_index.json", transformer=part)
    with pytest.raises(UserError, match=r"the component 'transformer' is .*; expected a folder"):
        SD3(path=str(folder / "sd3"), **CONFIG).load("cpu", "float32")
    edit(folder / "sd3" / "model_index.json", **{"transformer": ["diffusers", "A"], "../clip": ["diffusers", "A"]})
    with pytest.raises(UserError, match=r"the component '\.\./clip' is"):
        SD3(path=str(folder / "sd3"), **CONFIG).load("cpu", "float32")


def test_a_plan_of_a_configuration_that_makes_no_model(folder, capsys):
    edit(folder / "sd3" / "vae" / "config.json", up_block_types=[["x"]])
    run = replace(shapeworld_leapalign(), model=SD3(path="sd3", **CONFIG))
    (folder / "run.json").write_text(dumps(run))
    assert main(["train", "run.json", "--dry-run"]) == 2
    assert "sd3/vae: its configuration makes no AutoencoderKL" in capsys.readouterr().err


def test_a_scheduler_that_makes_no_grid(folder, capsys):
    edit(folder / "sd3" / "scheduler" / "scheduler_config.json", shift=0)  # zero by zero
    with pytest.raises(UserError, match=r"sd3: its scheduler makes \[.*nan.* of 3 sampling steps; expected numbers"):
        SD3(path="sd3", **CONFIG).load("cpu", "float32").sigmas(3)
    edit(folder / "sd3" / "scheduler" / "scheduler_config.json", shift_terminal=[1])
    with pytest.raises(UserError, match="sd3: the scheduler does not run"):
        SD3(path="sd3", **CONFIG).load("cpu", "float32").sigmas(3)


@pytest.mark.parametrize("name", ["_class_name", "transformer"])
def test_a_class_that_is_no_name(folder, capsys, name):
    edit(folder / "sd3" / "model_index.json", **{name: {}})
    assert main(["sample", "sd3", "--prompt", "a star", "--device", "cpu"]) == 2
    assert "leapalign: sd3: " in capsys.readouterr().err


def test_a_vae_without_numbers(folder):
    edit(folder / "sd3" / "vae" / "config.json", scaling_factor="x")
    with pytest.raises(UserError, match="sd3/vae: scaling_factor and shift_factor are not numbers"):
        SD3(path="sd3", **CONFIG).load("cpu", "float32")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": [1]}, "files of a [1]"),
        ("text_encoder/config.json", {"vocab_size": [1]}, "at most [1], as text_encoder has"),
        ("text_encoder/config.json", {"text_config": 1, "vocab_size": None}, ""),
        ("scheduler/scheduler_config.json", {"shift": "x"}, ""),
    ],
)
def test_verify_names_what_is_no_number(folder, capsys, file, change, said):
    edit(folder / "sd3" / file, **change)
    assert main(["verify", "sd3", "--steps", "1", "--size", "16", "--device", "cpu", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert any(said in check["came"] + check["expected"] for check in checks if check["state"] == "different")


def test_verify_passes_over_an_index_that_is_none(folder, capsys):
    (folder / "sd3" / "vae" / "x.safetensors.index.json").write_text('{"weight_map": {"a": ["b"]}}')
    assert main(["verify", "sd3", "--steps", "1", "--size", "16", "--device", "cpu", "--json"]) == 1
    assert "has no weight_map" in capsys.readouterr().out
    edit(folder / "clip" / "config.json", architectures=[1])
    assert main(["verify", f"pickscore={folder / 'clip'}", "--device", "cpu", "--json"]) in (0, 1)


def test_layers_of_a_text_encoder_that_does_not_say_how_many(tmp_path):
    tiny_pipelines.save(tiny_pipelines.flux2_pipeline(), tmp_path / "flux2")
    edit(tmp_path / "flux2" / "text_encoder" / "config.json", hidden_size=None)
    with pytest.raises(UserError, match="4 layers of None features; expected numbers"):
        _check_layers((1,), PipelineFolder(tmp_path / "flux2", {}), 16)


def test_pictures_to_decode_at_a_time(folder):
    with pytest.raises(UserError, match="decode_chunk -1: expected"):
        SD3(path="sd3", decode_chunk=-1, **CONFIG).load("cpu", "float32")
    latents = torch.zeros(2, 4, 8, 8)
    many, one = (SD3(path="sd3", decode_chunk=n, **CONFIG).load("cpu", "float32").decode(latents) for n in (2**64, 1))
    assert torch.allclose(many, one, atol=1e-6)


def test_a_configuration_that_is_not_that_of_its_weights(folder, capsys):
    edit(folder / "sd3" / "transformer" / "config.json", pos_embed_max_size={})
    words = ["sample", "sd3", "--prompt", "a red circle", "--size", "16", "--steps", "1", "--device", "cpu"]
    assert main(words) == 2
    assert "sd3: the transformer does not run: The size of tensor a" in capsys.readouterr().err


def test_a_reward_whose_files_do_not_fit_together(folder):
    path = folder / "clip" / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["unk_token"] = "<none>"
    record["model"]["vocab"] = {k: v for k, v in record["model"]["vocab"].items() if k != "<unk>"}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"pickscore: (the files at .* do not fit together|transformers cannot read)"):
        PickScore(path=str(folder / "clip")).load()


def test_a_checkpoint_that_is_no_file_of_torch(tmp_path):
    write_tiny_imagereward(tmp_path)
    (tmp_path / "ImageReward.pt").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="cannot be read as a file of tensors alone"):
        ImageReward(path=str(tmp_path)).load()


def test_a_picture_of_one_colour_is_scored(folder):
    """What rewards are tried on when they are loaded is nothing special."""
    reward = PickScore(path=str(folder / "clip")).load()
    assert reward.score_pil([Image.new("RGB", (3, 9))], ["a"]).shape == (1,)

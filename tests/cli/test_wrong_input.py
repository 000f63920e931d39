"""What the fuzz (tests/fuzz) has found, one input each: the message, and where it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_pipelines
from leapalign.cli import main
from leapalign.codec import decode, dumps
from leapalign.errors import MOST_LINES, RunStopped, UserError, first_time, opening, readable
from leapalign.evaluation.geneval import check_metadata
from leapalign.evaluation.sampling import Sampling
from leapalign.models.flux2 import _check_layers
from leapalign.models.folder import PipelineFolder, read_json, shards_of
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile, ShapeWorldPrompts
from leapalign.recipes import shapeworld_leapalign
from leapalign.rewards.clip import PickScore
from leapalign.rewards.imagereward import ImageReward
from leapalign.tensor_files import read_header
from tiny_checkpoints import write_tiny_imagereward
from tiny_clip import write_tiny_clip

CONFIG = {"height": 16, "width": 16, "max_sequence_length": 0}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=False), folder / "sd3")
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture
def folder(given, tmp_path, monkeypatch):
    """sd3/ and clip/, which the test may damage; the working folder."""
    import shutil

    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# errors.py


def test_what_a_library_raises_is_the_files_fault():
    class PanicException(BaseException):
        """As those of libraries in Rust."""

    for error in (KeyError("a"), ValueError("bad"), PanicException("no entry")):
        expected = pytest.raises(UserError, match=r"F cannot be opened: .*(KeyError: 'a'|bad|no entry); fetch it")
        with expected, opening("F cannot be opened", "fetch it"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        *(UserError("mine"), RunStopped("NaN"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")),
        *(SystemExit(2), KeyboardInterrupt(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")),
    ],
)
def test_what_is_no_files_fault_goes_through(error):
    with pytest.raises(type(error)) as raised, opening("F cannot be opened", "fetch it"):
        raise error
    assert raised.value is error


def test_only_until_it_has_gone_well_a_failure_is_the_files_fault():
    def fail(wrong: bool) -> str:
        if wrong:
            raise RuntimeError("sizes do not match")
        return "good"

    tried = first_time(fail, "F does not run", "copy it")
    for _ in range(2):
        with pytest.raises(UserError, match="F does not run: sizes do not match; copy it"):
            tried(True)
    assert tried(False) == "good"
    with pytest.raises(RuntimeError):
        tried(True)


def test_messages_are_for_a_terminal():
    assert readable("a\0b \x1b[31m \u202e é\nnext") == "a\\x00b \\x1b[31m \\u202e é\nnext"
    assert readable("\n".join("x" * 99)).count("\n") == MOST_LINES - 1 and "70 more lines" in readable("\n" * 98)
    assert len(readable("came " + "x" * 70_000 + " expected y")) < 2100
    assert readable("came " + "x" * 70_000 + " expected y").endswith("expected y")


# Command lines and run.json


def test_no_command_is_said_on_stderr(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("leapalign: give a command\n\nusage: leapalign COMMAND") and not said.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "sd3", "--prompt", "x", "--steps", "-1"], "num_steps is -1; it must be at least 1 and at most"),
        (["sample", "sd3", "--prompt", "x", "--num", "99999999999"], "images_per_prompt is 99999999999"),
        (["sample", "sd3", "--prompt", "x" * 10_001], "--prompt: a prompt of 10001 letters; expected at most 10000"),
        (["sample", "sd3", "--prompt", "a\0b"], "'a\\x00b' has a control character"),
        (["list", "--json", "\x1b[31m"], "'\\x1b[31m' has a control character, which no name and no prompt needs"),
        (["evaluate", "sd3", "--per-task", "0"], "shapeworld prompts: num 0, seed 0; expected 1 to"),
        (
            ["train", "shapeworld-refl", "--steps", "99999999999"],
            "steps is 99999999999; it must be at least 1 and at most",
        ),
    ],
)
def test_numbers_and_words_that_nobody_means(argv, message, capsys, folder):
    assert main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_too_little_memory_is_exit_1_in_every_command(capsys, folder, monkeypatch):
    def no_room(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 TB")

    monkeypatch.setattr("leapalign.sampling.draw_images", no_room)
    words = ["sample", "sd3", "--prompt", "a star", "--size", "16", "--device", "cpu"]
    assert main(words) == 1
    assert "leapalign: stopped: out of memory ([enforce fail" in capsys.readouterr().err
    monkeypatch.setattr("leapalign.sampling.draw_images", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is shown as it is
        main(words)


@pytest.mark.parametrize("out", ["file/x", "file"])
def test_a_folder_that_cannot_be_made(out, capsys, folder):
    (folder / "file").write_text("mine")
    words = ["sample", "sd3", "--prompt", "a star", "--size", "16", "--steps", "1", "--device", "cpu", "--out", out]
    assert main(words) == 2
    assert "give another --out" in capsys.readouterr().err and (folder / "file").read_text() == "mine"


def test_names_that_the_system_refuses(capsys, folder):
    (folder / "loop").symlink_to("loop")
    for words, message in (
        (["evaluate", "x" * 300], ": this name is too long; give another"),
        (["train", "sd3/../clip/model.safetensors/run.json"], "cannot read the run (Not a directory)"),
        (["score", "loop", "--reward", "pickscore=clip", "--prompt", "a"], "loop: "),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_way_back_is_no_new_folder(capsys, folder):
    """new/.. is there only once new is: the working folder must be neither taken for a run's nor replaced."""
    (folder / "run.json").write_text("mine")
    assert main(["train", "shapeworld-refl", "--out", "new/..", "--device", "cpu"]) == 2
    assert "new/..: this folder is not empty" in capsys.readouterr().err and (folder / "run.json").read_text() == "mine"


def test_a_way_back_is_no_place_to_save(folder):
    model = SD3(path="sd3", **CONFIG).load("cpu", "float32")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="exists and is no pipeline folder"):
        model.save("new/..")
    assert sorted(folder.rglob("*")) == before


def test_a_nul_in_run_json():
    record = json.loads(dumps(replace(shapeworld_leapalign(), out="a\0b")))
    with pytest.raises(UserError, match=r'out: "a\\u0000b" has a NUL character'):
        decode(type(shapeworld_leapalign()), record)


def test_counts_have_an_end():
    for change in ({"steps": 10**10}, {"probe_size": 10**10}, {"warmup_steps": -1}):
        with pytest.raises(UserError, match="and at most 1000000000"):
            replace(shapeworld_leapalign(), **change)
    for wrong in ({"num": 0}, {"num": 10**9}, {"seed": -1}):
        with pytest.raises(UserError, match="shapeworld prompts"):
            ShapeWorldPrompts(**wrong)
    with pytest.raises(UserError, match="batch_size is 0"):
        Sampling(batch_size=0)


# Prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "a\n{}"), ("p.csv", "prompt\n{}\n"), ("p.jsonl", '{{"prompt": "a"}}\n{{"prompt": "{}"}}')],
)
def test_a_line_that_is_no_prompt(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content.format("a" * 100_000))
    with pytest.raises(UserError, match=f"{name}, line 2: a prompt of 100000 letters"):
        PromptFile(path=str(file)).load()
    file.write_text(content.format("a" * 10_000))
    assert PromptFile(path=str(file)).load()[-1].text == "a" * 10_000


GOOD = {"tag": "position", "prompt": "p", "include": [{"class": "dog", "count": 1, "color": "red"}, None]}
GOOD["include"][1] = {"class": "cat", "count": 2, "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": 1}, "its GenEval tag is 1; expected a text"),
        ({"include": {}}, "its include is {}; expected a list"),
        ({"include": ["dog"]}, r"include\[0\] is 'dog'; expected a claim"),
        ({"include": [{"class": "dog"}]}, r"include\[0\]"),
        ({"include": [{"class": 1, "count": 1}]}, r"include\[0\]"),
        ({"include": [{"class": "dog", "count": True}]}, r"include\[0\]"),
        ({"include": [{"class": "dog", "count": 1, "color": None}]}, r"include\[0\]"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, r"include\[0\]"),
        ({"exclude": [{"class": "dog", "count": 0}]}, r"exclude\[0\]"),
        ({"include": [GOOD["include"][0], GOOD["include"][1] | {"position": [["above"], 0]}]}, r"include\[1\]"),
    ],
)
def test_metadata_that_geneval_cannot_judge(change, message):
    check_metadata(GOOD)
    with pytest.raises(UserError, match=message):
        check_metadata(GOOD | change)


def test_evaluate_checks_the_metadata_and_leaves_foreign_objects_alone(folder, capsys):
    (folder / "run").mkdir()
    words = ["evaluate", "embedded:generator", "--steps", "2", "--device", "cpu", "--prompts", "p.jsonl", "--json"]
    (folder / "p.jsonl").write_text('{"tag": "x", "include": ["circle"], "prompt": "a circle"}')
    assert main(words) == 2
    assert "prompt 'a circle': include[0] is 'circle'" in capsys.readouterr().err
    (folder / "p.jsonl").write_text('{"tag": "x", "source": 3, "prompt": "a circle"}')
    assert main(words) == 0
    assert "geneval" not in json.loads(capsys.readouterr().out)


# Folders of models


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
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', which is no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no file beside it"),
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
    with pytest.raises(UserError, match=r"the part 'transformer' is .*; expected a folder"):
        SD3(path=str(folder / "sd3"), **CONFIG).load("cpu", "float32")
    edit(folder / "sd3" / "model_index.json", **{"transformer": ["diffusers", "A"], "../clip": ["diffusers", "A"]})
    with pytest.raises(UserError, match=r"the part '\.\./clip' is"):
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
    with pytest.raises(UserError, match="sd3/vae: its scaling_factor and shift_factor are no numbers"):
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
    assert reward.score_pictures([Image.new("RGB", (3, 9))], ["a"]).shape == (1,)

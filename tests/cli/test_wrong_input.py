"""What the fuzz (tests/fuzz) has found, one input each: the message, and where it comes from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from leapalign.cli import main
from leapalign.codec import decode, dumps
from leapalign.errors import MAX_LINES, RunStopped, UserError, first_time, opening, readable
from leapalign.evaluation.sampling import Sampling
from leapalign.geneval.rules import check_metadata
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile, ShapeWorldPrompts
from leapalign.recipes import shapeworld_leapalign

CONFIG = {"height": 16, "width": 16, "max_sequence_length": 0}


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
    assert readable("\n".join("x" * 99)).count("\n") == MAX_LINES - 1 and "70 more lines" in readable("\n" * 98)
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
        (["sample", "sd3", "--prompt", "x" * 10_001], "--prompt: a prompt of 10001 characters; expected at most 10000"),
        (["sample", "sd3", "--prompt", "a\0b"], "'a\\x00b' contains a control character"),
        (["list", "--json", "\x1b[31m"], "'\\x1b[31m' contains a control character"),
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

    monkeypatch.setattr("leapalign.evaluation.sampling.draw_files", no_room)
    words = ["sample", "sd3", "--prompt", "a star", "--size", "16", "--device", "cpu"]
    assert main(words) == 1
    assert "leapalign: stopped: out of memory ([enforce fail" in capsys.readouterr().err
    monkeypatch.setattr("leapalign.evaluation.sampling.draw_files", lambda *args: 1 / 0)
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
    with pytest.raises(UserError, match="exists and is not a pipeline folder"):
        model.save("new/..")
    assert sorted(folder.rglob("*")) == before


def test_a_nul_in_run_json():
    record = json.loads(dumps(shapeworld_leapalign())) | {"out": "a\0b"}
    with pytest.raises(UserError, match=r'out: "a\\u0000b" contains a NUL character'):
        decode(type(shapeworld_leapalign()), record)


def test_counts_have_an_end():
    for change in ({"steps": 10**10}, {"evaluation_size": 10**10}, {"warmup_steps": -1}):
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
    with pytest.raises(UserError, match=f"{name}, line 2: a prompt of 100000 characters"):
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

"""The command line as a user meets it: exit status, messages, help without torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from leapalign.cli import COMMANDS, main
from leapalign.codec import dumps
from leapalign.errors import RunStopped
from leapalign.recipes import RECIPES, shapeworld_leapalign

HELPED = [*(name for name in RECIPES if name.startswith("shapeworld")), "flux-leapalign-hpsv21"]  # the others are alike
TINY = Path(__file__).parents[1] / "training" / "tiny_recipe.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with the tiny recipe's prompts."""
    (tmp_path / "prompts.txt").write_text("red\na green one\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


HELP = """
import contextlib, io, sys
from leapalign.cli import main
for argv in {argvs}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0, argv
    assert "usage:" in out.getvalue() or argv[0] in ("list", "--version"), argv
heavy = sorted({{"torch", "diffusers", "transformers", "numpy", "scipy"}} & sys.modules.keys())
assert not heavy, heavy
"""


def test_help_and_list_need_no_torch_and_no_second():
    """Every help and list, in one process; measured as processor time, so that a busy machine does not matter."""
    argvs = [["--help"], *([c, "--help"] for c in COMMANDS), *(["train", r, "--help"] for r in HELPED)]
    argvs += [["list"], ["list", "rewards"], ["list", "--json"], ["--version"]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", HELP.format(argvs=argvs)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.15 * len(argvs)  # a single one takes about 0.3 s, torch alone about 2 s; together 0.08 s each


@pytest.mark.parametrize(
    "module", ["leapalign.recipes", "leapalign.run", "leapalign.prompts", "leapalign.lookup.catalog"]
)
def test_configuration_imports_no_torch(module):
    code = f"import {module}, sys; assert not {{'torch', 'numpy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_the_recipes_flags(capsys):
    assert main(["train", "shapeworld-leapalign", "--help"]) == 0
    text = capsys.readouterr().out
    top = ("steps", "batch-size", "micro-batch-size", "checkpoint-every", "out", "seed", "device", "dtype", "json")
    for flag in (*top, "method.nested-scale", "model.guidance-scale", "rewards.0.threshold"):
        assert f"--{flag} " in text or f"--{flag}," in text, flag
    assert main(["train", "shapeworld-refl", "--help"]) == 0
    assert "--method.early-stop " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: leapalign COMMAND"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "give the recipe first"),
        (["train", "--steps", "3"], "give the recipe first"),
        (["train", "shapeworld-leapaling"], "did you mean 'shapeworld-leapalign'?"),
        (["train", "shapeworld-leapalign", "--batch-sise", "3"], "--batch-size"),
        (["train", "shapeworld-leapalign", "--method.nested-scal", "3"], "--method.nested-scale"),
        (["train", "shapeworld-leapalign", "--steps", "many"], "--steps"),
        (["train", "shapeworld-leapalign", "--graph", "none"], "Expected one of ('all'"),
        (["train", "shapeworld-leapalign", "--batch-size", "30", "--micro-batch-size", "8"], "use batch_size 24 or 32"),
        (["train", "shapeworld-leapalign", "--method.nested-scale", "7"], "nested_scale=7"),
        (["train", "none.json"], "none.json: cannot read the run"),
        (["train", "none.py:run"], "none.py: file not found"),
        (["train", f"{TINY}:tinny"], "the file defines no 'tinny'; did you mean 'tiny'?"),
        (["train", f"{TINY}:TinyModel"], "TinyModel is a TinyModel; a recipe is a function that returns"),
        (["resume", "nowhere"], "nowhere/run.json: cannot read the run"),
        (["resume"], "required"),
        (["sample", "nowhere", "--prompt", "x"], "folder not found"),
        (["evaluate", "nowhere"], "folder not found"),
        (["list", "method"], "methods"),
        (["list", "--jsn"], "--json"),
    ],
)
def test_a_mistake_is_exit_2_and_a_sentence(argv, message, capsys, folder):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert message in said.err + said.out if not argv else message in said.err
    assert "Traceback" not in said.err
    assert not (folder / "runs").exists()


def test_a_typo_in_run_json_is_exit_2(capsys, folder):
    (folder / "run.json").write_text(dumps(shapeworld_leapalign()).replace("batch_size", "batchsize", 1))
    assert main(["train", "run.json"]) == 2
    assert "unknown key 'batchsize'; did you mean 'batch_size'?" in capsys.readouterr().err


def test_a_recipe_with_a_syntax_error_is_exit_2(capsys, folder):
    (folder / "mine.py").write_text("def run(:\n")
    assert main(["train", "mine.py:run"]) == 2
    assert "mine.py, line 1" in capsys.readouterr().err


def test_train_resume_and_replay(capsys, folder):
    """flags -> run.json -> the same run again; --json is all that stands on stdout."""
    flags = ["--steps", "2", "--method.nested-scale", "0.1", "--batch-size", "2", "--seed", "5"]
    assert main(["train", f"{TINY}:tiny", *flags, "--out", "one", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    record = json.loads(Path("one/run.json").read_text())
    assert (record["steps"], record["method"]["nested_scale"], record["batch_size"], record["seed"]) == (2, 0.1, 2, 5)
    assert main(["train", "one/run.json", "--plugin", str(TINY), "--out", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reward"] == first["reward"]
    assert main(["train", "one/run.json", "--plugin", str(TINY)]) == 2
    assert "not empty; use `leapalign resume one`" in capsys.readouterr().err
    assert main(["resume", "one", "--plugin", str(TINY), "--steps", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    record["learning_rate"] = 0.5
    Path("one/run.json").write_text(json.dumps(record))
    assert main(["resume", "one", "--plugin", str(TINY)]) == 2
    assert "learning_rate: 0.01 -> 0.5" in capsys.readouterr().err


def test_a_stopped_run_is_exit_1_and_an_interrupt_130(capsys, folder, monkeypatch):
    from leapalign.training import loop

    def ends_with(error: BaseException):
        def train(*args, **kwargs):
            raise error

        return train

    monkeypatch.setattr(loop, "train", ends_with(RunStopped("step 3: the loss is nan")))
    assert main(["train", f"{TINY}:tiny"]) == 1
    assert "stopped at step 3: the loss is nan" in capsys.readouterr().err
    monkeypatch.setattr(loop, "train", ends_with(KeyboardInterrupt()))
    assert main(["train", f"{TINY}:tiny"]) == 130
    assert "leapalign resume" in capsys.readouterr().err


def test_list_finds_what_is_there(capsys):
    assert main(["list", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    names = {kind: {entry["name"] for entry in entries} for kind, entries in table.items()}
    assert {"leapalign", "refl", "draft-k", "draft-lv", "drtune", "alignprop"} <= names["methods"]
    assert {"flowbp-sparse", "flowbp-bridge", "flowbp-lagrange", "rsm"} <= names["methods"]
    assert {"sd3", "flux"} <= names["models"] and {"pickscore", "clipscore"} <= names["rewards"]
    assert names["recipes"] == set(RECIPES)
    assert main(["list", "methods"]) == 0
    assert "draft-lv" in capsys.readouterr().out

"""`leapalign score`, and rewards of the user's own file, by the example that the documentation shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.images import read_image
from leapalign.lookup.recipes import load_file
from leapalign.lookup.rewards import is_reward, reward_config
from leapalign.rewards import OCR, CLIPScore, HPSv2, PickScore, UnifiedReward
from leapalign.rewards.custom import Custom
from leapalign.shapeworld.world import COLORS, Object, render
from leapalign.training.tracking import read_metrics
from tiny_checkpoints import write_tiny_hpsv2, write_tiny_imagereward
from tiny_qwen import write_tiny_hpsv3

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_reward.py"


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """A red circle and a blue square, as PNG files."""
    scenes = [(Object("circle", "red", 8, 8, 5.5),), (Object("square", "blue", 24, 24, 5.5),)]
    files = [tmp_path / "circle.png", tmp_path / "square.png"]
    for file, image in zip(files, render(scenes)):
        Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(file)
    return [str(file) for file in files]


def answer(capsys, *argv: str) -> list[dict]:
    assert main(["score", *argv, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_say_which_picture_fits_and_equal_the_reward_s_own(pictures, capsys):
    rows = answer(
        capsys,
        *pictures,
        "--reward",
        "pickscore=embedded:reward",
        "--prompt",
        "a photo of a red circle",
        "--batch-size",
        "1",
    )
    scores = [row["scores"]["pickscore=embedded:reward"] for row in rows]
    assert scores[0] > scores[1] + 0.3
    reward = PickScore(path="embedded:reward").load()
    own = reward.score_pil([Image.open(p) for p in pictures], [rows[0]["prompt"]] * 2)
    assert scores == pytest.approx(own.tolist(), abs=1e-6)
    assert [row["image"] for row in rows] == pictures


def test_a_name_that_the_terminal_cannot_show(pictures):
    """A process of its own, whose stdout is ASCII: neither an accent nor a byte of no text ends it."""
    file = os.fsencode(pictures[0]).replace(b"circle", b"\xffcircl\xc3\xa9")
    os.rename(pictures[0], file)
    words = ["score", file, "--reward", "pickscore=embedded:reward", "--prompt", "a circle", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    said = subprocess.run([sys.executable, "-m", "leapalign", *words], capture_output=True, env=environment)
    assert said.returncode == 0, said.stderr
    assert b"\\udcffcircl\\xe9.png" in said.stdout


def test_a_prompt_an_image_from_flags_or_from_a_file(pictures, capsys, tmp_path):
    texts = ["a photo of a red circle", "a photo of a blue square"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    word = ["--reward", "pickscore=embedded:reward"]
    by_flags = answer(capsys, *pictures, *word, "--prompt", *texts)
    by_file = answer(capsys, *pictures, *word, "--prompts", str(tmp_path / "prompts.txt"))
    assert by_flags == by_file and [row["prompt"] for row in by_flags] == texts
    swapped = answer(capsys, *pictures, *word, "--prompt", *texts[::-1])
    assert min(a["scores"][word[1]] - b["scores"][word[1]] for a, b in zip(by_flags, swapped)) > 0.3


def test_several_rewards_and_a_readable_table(pictures, capsys):
    own = f"{EXAMPLE}:warmth"
    words = ["--reward", "pickscore=embedded:judge", own]
    assert main(["score", *pictures, *words, "--prompt", "a photo of a red circle", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].split() == ["image", *words[1:]] and lines[3].startswith("mean")
    red, ground = np.array(COLORS["red"]), 0.94 - 0.92
    warm, cold = (float(line.split()[-1]) for line in lines[1:3])
    assert warm > ground > cold and warm < red[0] - red[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--reward": ["pickscor"]}, "unknown reward 'pickscor'; did you mean 'pickscore'?"),
        ({"--reward": ["no.py:f"]}, "no.py: file not found"),
        ({"--reward": [f"{EXAMPLE}:warmt"]}, "the file defines no 'warmt'; did you mean 'warmth'?"),
        ({"--reward": ["custom"]}, "--reward my_file.py:name"),
        ({"--prompt": ["a", "b", "c"]}, "2 images and 3 prompts"),
        ({"--prompt": []}, "give either --prompt"),
        ({"--prompts": ["x.txt"]}, "give either --prompt"),
    ],
)
def test_mistakes_are_named(pictures, capsys, change, message):
    flags = {"--reward": ["pickscore=embedded:reward"], "--prompt": ["a photo of a circle"]} | change
    words = [word for name, values in flags.items() for word in (name, *values) if values]
    assert main(["score", *pictures, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused(tmp_path, content):
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.png: cannot be read as an image"):
        read_image(file)
    with pytest.raises(UserError, match=r"gone\.png: file not found"):
        read_image(tmp_path / "gone.png")


def test_a_nan_stops_with_picture_and_prompt(pictures, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("def score(images):\n    return images.mean((1, 2, 3)) * float('nan')\n")
    assert main(["score", *pictures, "--reward", f"{tmp_path}/broken.py:score", "--prompt", "a red circle"]) == 1
    message = capsys.readouterr().err
    assert "is nan" in message and "circle.png" in message and "a red circle" in message


# The user's own


def test_the_documented_example_trains_with_both_rewards(tmp_path, capsys):
    flags = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--micro-batch-size",
        "4",
        "--evaluation-size",
        "2",
        "--device",
        "cpu",
    ]
    assert main(["train", f"{EXAMPLE}:warmer", *flags, "--out", str(tmp_path / "run")]) == 0
    last = read_metrics(tmp_path / "run")[-1]
    assert {"reward/custom", "reward/pickscore", "hinge/custom", "slope/custom", "slope/pickscore"} <= last.keys()
    assert last["slope/custom"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["rewards"][1]["reward"]["function"] == "own_reward.py:warmth"


def test_a_run_json_never_runs_the_file_by_itself(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("leapalign_user_")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"own_reward\.py:warmth is code of your own; give its file again"):
        Custom(function="own_reward.py:warmth").load()


def test_a_function_may_take_images_alone_and_its_answer_is_checked(tmp_path):
    file = tmp_path / "alone.py"
    file.write_text(
        "def bright(images):\n    return images.mean((1, 2, 3))\n"
        "def one(images, prompts):\n    return images.mean()\n"
        "def many(a, b, c):\n    return a\n"
    )
    load_file(str(file))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(Custom(function="alone.py:bright").load()(images, ["a", "b"]), images.mean((1, 2, 3)))
    with pytest.raises(UserError, match=r"alone.py:one gave \[\] for 2 images"):
        Custom(function="alone.py:one").load()(images, ["a", "b"])
    with pytest.raises(UserError, match="takes 3 arguments"):
        Custom(function="alone.py:many").load()
    with pytest.raises(UserError, match="has no function 'none'"):
        Custom(function="alone.py:none").load()
    with pytest.raises(UserError, match=r"expected file.py:name"):
        Custom(function="alone:bright")


def test_a_path_is_for_rewards_that_have_one():
    assert reward_config("pickscore=some/where") == PickScore(path="some/where")
    assert reward_config("pickscore") == PickScore()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hpsv2=x.pt,processor=y", HPSv2(path="x.pt", processor="y")),
        ("pickscore=a,b/c", PickScore(path="a,b/c")),
        ("pickscore=a,output=logit", PickScore(path="a", output="logit")),
        ("unified,version=2,max_new_tokens=5", UnifiedReward(version="2", max_new_tokens=5)),
        ("clipscore,clamp=true", CLIPScore(clamp=True)),
        ("ocr,region=[0,0,1,0.5]", OCR(region=(0.0, 0.0, 1.0, 0.5))),
    ],
)
def test_a_word_may_set_more_fields(word, expected):
    assert reward_config(word) == expected and is_reward(word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pickscore,outpt=logit", "the fields of pickscore are path, processor, output"),
        ("pickscore=x,output=logi", "'logi' is not one of 'cosine', 'logit'; did you mean 'logit'?"),
        ("clipscore,clamp=yes", "clamp: expected true or false"),
    ],
)
def test_a_field_that_is_wrong_is_named(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        reward_config(word)


# One checkpoint and its tokenizer in one folder, on a machine without a network


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


WITH_A_TOKENIZER = {"hpsv2": write_tiny_hpsv2, "imagereward": write_tiny_imagereward, "hpsv3": write_tiny_hpsv3}


@pytest.mark.parametrize(("name", "write"), WITH_A_TOKENIZER.items())
def test_the_tokenizer_beside_the_checkpoint_is_found(name, write, pictures, capsys, tmp_path, offline):
    folder = write(tmp_path / "both")
    (row,) = answer(capsys, pictures[0], "--reward", f"{name}={folder}", "--prompt", "a red circle")
    apart = tmp_path / "apart"
    apart.mkdir()
    (checkpoint,) = (f for f in folder.iterdir() if f.suffix == ".pt" or f.name == "HPSv3.safetensors")
    checkpoint.rename(apart / checkpoint.name)
    if name != "hpsv3":
        shutil.copy(folder / "config.json", apart)
    words = [pictures[0], "--prompt", "a red circle", "--device", "cpu", "--reward"]
    assert main(["score", *words, f"{name}={apart}"]) == 2
    assert f"--reward {name}=PATH,processor=FOLDER" in " ".join(capsys.readouterr().err.split())
    word = f"{name}={apart},processor={folder}"
    (again,) = answer(capsys, pictures[0], "--reward", word, "--prompt", "a red circle")
    assert list(again["scores"].values()) == list(row["scores"].values())


def test_an_image_that_a_reward_cannot_take_is_named_by_its_file(pictures, capsys, tmp_path):
    (tmp_path / "picky.py").write_text(
        "from leapalign.rewards.base import UnfitImage\n"
        "class Loaded:\n"
        "    def __call__(self, images, prompts): return images.mean((1, 2, 3))\n"
        "    def score_pil(self, images, prompts): raise UnfitImage('too round', 1)\n"
        "class Picky:\n"
        "    def load(self, device, dtype): return Loaded()\n"
    )
    words = ["--reward", f"{tmp_path}/picky.py:Picky", "--prompt", "a circle", "--device", "cpu"]
    assert main(["score", *pictures, *words]) == 2
    assert f"{pictures[1]}: too round" in capsys.readouterr().err

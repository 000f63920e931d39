"""Prompts that are longer than what a reward reads: counted and told once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from leapalign.cli import main
from leapalign.lookup.recipes import load_file
from leapalign.prompts import PromptFile
from leapalign.rewards import CLIPScore, HPSv2, HPSv3, ImageReward, PickScore
from leapalign.rewards.adapt import complete, tell_longer
from leapalign.run import RewardTerm
from leapalign.training import loop
from tiny_checkpoints import write_tiny_hpsv2, write_tiny_imagereward
from tiny_clip import TEXT_LENGTH, write_tiny_clip
from tiny_qwen import write_tiny_hpsv3

RECIPE = Path(__file__).parents[1] / "training" / "tiny_recipe.py"
SHORT, LONG = "a red circle", "a red circle " * 20


def words(count: int) -> str:
    return " ".join(["red"] * count)


@pytest.mark.parametrize("config", [PickScore, CLIPScore])
def test_clip_reads_its_own_length_with_start_and_end(config: Any, tmp_path: Path) -> None:
    reward = config(path=str(write_tiny_clip(tmp_path))).load()
    found = reward.longer([words(TEXT_LENGTH - 2), words(TEXT_LENGTH - 1), SHORT])
    assert (found.count, found.limit) == (1, TEXT_LENGTH)


def test_a_prefix_counts(tmp_path: Path) -> None:
    folder = str(write_tiny_clip(tmp_path))
    texts = [words(TEXT_LENGTH - 2)]
    assert CLIPScore(path=folder).load().longer(texts).count == 0
    assert CLIPScore(path=folder, convention="hessel").load().longer(texts).count == 1


def test_imagereward_reads_35_tokens(tmp_path: Path) -> None:
    reward = ImageReward(path=str(write_tiny_imagereward(tmp_path / "ir"))).load()
    found = reward.longer([words(33), words(34)])
    assert (found.count, found.limit) == (1, 35)


def test_hpsv3_and_functions_read_all(tmp_path: Path) -> None:
    assert HPSv3(path=str(write_tiny_hpsv3(tmp_path))).load().longer([LONG]) is None
    assert complete("mine", lambda images, prompts: images.mean((1, 2, 3))).longer([LONG]) is None


def test_one_line_a_reward_and_none_where_all_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = HPSv2(path=str(write_tiny_hpsv2(tmp_path / "hpsv2"))).load()
    capsys.readouterr()
    tell_longer({"hpsv2": reward}, [SHORT])
    assert capsys.readouterr().err == ""
    tell_longer({"hpsv2": reward}, [SHORT, LONG, LONG])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("tokens of a prompt: 1 of 2 prompts are longer and are truncated")


def test_score_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    argv = ["score", str(tmp_path / "a.png"), "--reward", f"pickscore={folder}", "--prompt", LONG, "--device", "cpu"]
    assert main(argv) == 0
    assert f"the reward pickscore={folder} reads {TEXT_LENGTH} tokens" in capsys.readouterr().err


def test_a_run_tells_it_of_the_prompts_that_it_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text(f"{SHORT}\n{LONG}\n")
    term = RewardTerm(reward=PickScore(path=str(write_tiny_clip(tmp_path / "clip"))), threshold=2.0)
    run = replace(load_file(str(RECIPE)).tiny(), rewards=(term,), out=str(tmp_path / "run"))
    loop.build(replace(run, prompts=PromptFile(path=str(tmp_path / "prompts.txt"))))
    assert f"the reward pickscore reads {TEXT_LENGTH} tokens of a prompt: 1 of 2" in capsys.readouterr().err

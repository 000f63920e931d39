"""The demo's whole way on a tiny random pipeline: the files, the summary's keys, and numbers that can be checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from leapalign.errors import UserError
from leapalign.evaluation.diversity import Diverse
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.geneval.rules import Detection
from leapalign.images import to_pil, to_tensor
from leapalign.methods.leapalign import LeapAlign
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.report.tables import print_study
from leapalign.run import RewardTerm, Run
from leapalign.studies.before_after import Study, conduct, facts

TEXTS = {"single_object": ("a red circle", "a blue circle", "a star"), "colors": ("a red square", "a green star")}
PROMPTS = [
    Prompt(text, {"tag": tag, "include": [{"class": "bright", "count": 1}], "prompt": text})
    for tag, texts in TEXTS.items()
    for text in texts
]


def bright(images: torch.Tensor) -> list[list[Detection]]:
    """Stands in for a detector: pictures of odd rows hold something."""
    return [[Detection("bright", None, (0, 0, 8, 8), 0.95)] if i % 2 else [] for i in range(len(images))]


@pytest.fixture(scope="module")
def study(model_config, reward_config, held_out_config, tmp_path_factory) -> Study:
    run = Run(
        name="tiny",
        model=model_config,
        method=LeapAlign(),
        rewards=(RewardTerm(reward=reward_config, threshold=5.0),),
        prompts=ShapeWorldPrompts(num=8),
        out=str(tmp_path_factory.mktemp("demo") / "run"),
        steps=3,
        batch_size=4,
        micro_batch_size=4,
        num_sampling_steps=4,
        learning_rate=3e-3,
        ema_decay=0.5,
        evaluate_every=1,
        evaluation_size=4,
        device="cpu",
    )
    several = Diverse(prompts=PROMPTS[:2], images_per_prompt=2)
    settings = {"prompts": PROMPTS, "detector": bright, "diversity": several, "command": "leapalign demo"}
    return Study(run=run, held_out=held_out_config, **settings)


@pytest.fixture(scope="module")
def summary(study: Study) -> dict:
    return conduct(study)


def test_every_file_is_there(study: Study, summary: dict) -> None:
    from pathlib import Path

    out = Path(study.run.out)
    for name in ("run.json", "metrics.jsonl", "report.html", "before.png", "after.png", "verdicts.png"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    before, after = (np.asarray(Image.open(out / f"{name}.png")) for name in ("before", "after"))
    assert before.shape == after.shape and not np.array_equal(before, after)


def test_summary_holds_what_scripts_read(study: Study, summary: dict) -> None:
    assert summary["steps"] == 3 and 0 < summary["seconds"] < 600
    assert set(summary["geneval"]["per_task"]) == set(TEXTS)
    assert summary["geneval"]["before"] == pytest.approx((1 / 3 + 1 / 2) / 2)  # rows 1 of 0-2, 3 of 3-4
    for row in (
        summary["geneval"],
        summary["reward"],
        summary["held_out_reward"],
        *summary["geneval"]["per_task"].values(),
    ):
        assert {"before", "after", "difference", "difference_standard_error", "before_standard_error"} <= set(row)
    assert summary["geneval"]["difference"] == 0  # the stand-in sees the same in any pictures
    assert summary["held_out_reward"]["before"] != summary["reward"]["before"]
    for space in ("pixels", "clip-image"):
        row = summary["diversity"][space]
        assert row["num"] == 2 and row["ratio"] == row["after"] / row["before"]
    assert summary["image_statistics"]["brightness"]["num"] == len(PROMPTS)
    assert summary["open_colors"] is None  # the stand-in names no colours


def test_the_pictures_are_those_of_the_saved_pipeline(study: Study, summary: dict, model_config, reward_config) -> None:
    """Reward before and after, computed again from the two folders."""
    from dataclasses import replace

    reward, texts = reward_config.load("cpu", "float32"), [p.text for p in PROMPTS]
    for when, path in (("before", model_config.path), ("after", summary["pipeline"])):
        model = replace(model_config, path=path).load("cpu", "float32")
        images = draw_images(model, texts, Sampling(num_steps=4))
        images = torch.stack([to_tensor(to_pil(image)) for image in images])  # image files have 8 bits
        with torch.no_grad():
            assert summary["reward"][when] == pytest.approx(float(reward(images, texts).mean()), abs=1e-5)
    assert summary["reward"]["before"] != summary["reward"]["after"]


def test_a_used_folder_is_refused_before_any_work(study: Study, summary: dict) -> None:
    with pytest.raises(UserError, match="not empty"):
        conduct(study)


def test_the_table_is_for_eyes(study: Study, summary: dict, capsys: pytest.CaptureFixture) -> None:
    print_study(summary, f"look at {study.run.out}/report.html")
    printed = capsys.readouterr()
    assert "report.html" in printed.out and "±" in printed.out
    assert {"Machine", "Time", "Versions"} == set(facts({"training": 2.0}))

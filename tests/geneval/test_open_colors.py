"""Open colours of hand-made detections and of rendered scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leapalign.geneval.open_colors import entropy, is_open, open_colors
from leapalign.geneval.rules import Detection
from leapalign.geneval.wording import bound, colored, counted, positioned, single, two
from leapalign.shapeworld.captions import evaluation_prompts, scene_of
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import COLORS, render


def found(*colors: str | None, score: float = 0.9) -> list[Detection]:
    return [Detection("circle", color, (0, 0, 1, 1), score) for color in colors]


def test_prompts_that_leave_colours_open() -> None:
    for metadata in (single("circle"), two("circle", "ring"), counted("ring", 3), positioned("ring", "above", "cross")):
        assert is_open(metadata)
    for metadata in (colored("ring", "red"), bound("ring", "red", "cross", "blue"), {"prompt": "anything"}):
        assert not is_open(metadata)


def test_only_open_prompts_and_sure_detections_count() -> None:
    metadata = [two("circle", "ring"), colored("ring", "red"), single("circle"), {}]
    detections = [found("red", "blue", None), found("red"), [*found("blue"), *found("red", score=0.3)], found("red")]
    assert open_colors(metadata, detections) == {"red": 1, "blue": 2}


def test_entropy_in_bits() -> None:
    assert entropy({"red": 4, "blue": 4}) == 1 and entropy({"red": 7}) == 0 and entropy({}) == 0
    assert entropy({"red": 1, "blue": 3}) == pytest.approx(2 - 0.75 * math.log2(3))
    assert entropy(dict.fromkeys(COLORS, 5)) == pytest.approx(math.log2(6))


def test_scenes_of_the_world_have_all_colours_and_a_collapsed_one_has_one() -> None:
    rng, prompts = np.random.default_rng(0), evaluation_prompts(20)
    scenes = [scene_of(prompt, rng) for prompt in prompts]
    images = render(scenes)
    counts = open_colors(prompts, detect(images))
    expected = [o.color for prompt, scene in zip(prompts, scenes) if is_open(prompt) for o in scene]
    assert counts == {color: expected.count(color) for color in COLORS}
    assert 2.5 < entropy(counts) <= math.log2(6)
    blue = render([tuple(type(o)(o.shape, "blue", o.x, o.y, o.radius) for o in scene) for scene in scenes])
    assert set(open_colors(prompts, detect(blue))) == {"blue"} and entropy(open_colors(prompts, detect(blue))) == 0

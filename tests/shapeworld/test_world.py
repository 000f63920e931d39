"""ShapeWorld's captions and scenes: what is claimed is drawn, what nearly is claimed is not, test prompts are new."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from leapalign.geneval.rules import Detection, judge
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.world import COLORS, GROUND, SIZE, Object, Scene, coverage, render
from leapalign.studies.shapeworld_build.clip import true_by_accident
from leapalign.studies.shapeworld_build.scenes import SLOPPY, STRICT, captioned_scene


def seen(scene: Scene) -> list[Detection]:
    """What a perfect detector would report."""
    return [
        Detection(o.shape, o.color, (o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius), 1.0)
        for o in scene
    ]


def is_true(caption: c.Metadata, scene: Scene) -> bool:
    return judge(caption, seen(scene)).correct


@pytest.mark.parametrize("tag", c.TASKS)
def test_every_caption_is_true_of_its_scenes_and_its_near_misses_are_not(tag: str) -> None:
    rng = np.random.default_rng(0)
    for wordings in c.all_captions(tag)[:60]:
        for caption in wordings:
            scene = c.scene_of(caption, rng)
            assert is_true(caption, scene), caption
            assert not [m["prompt"] for m in c.near_misses(caption) if is_true(m, scene)], caption


@pytest.mark.parametrize("tag", c.TASKS)
def test_both_wordings_say_the_same(tag: str) -> None:
    rng = np.random.default_rng(1)
    for wordings in c.all_captions(tag):
        scene = c.scene_of(wordings[0], rng)
        assert all(is_true(caption, scene) for caption in wordings)


def test_no_scene_makes_a_test_combination_true_among_the_training_prompts() -> None:
    """Disjoint by what is claimed, not by words: a swapped order is the same combination."""
    rng = np.random.default_rng(2)
    for tag in c.TASKS[1:]:
        train, test = c.split(tag)
        texts = {caption["prompt"] for wordings in train for caption in wordings}
        for wordings in test:
            scene = c.scene_of(wordings[0], rng)
            same = [w["prompt"] for ws in train for w in ws if is_true(w, scene)]
            assert not same, (wordings, same)
            assert not texts & {caption["prompt"] for caption in wordings}
        assert len(test) == c.HELD_OUT[tag] and len(train) + len(test) == len(c.all_captions(tag))


def test_sizes_of_the_worlds_tasks() -> None:
    """6 shapes; 15 pairs; 6 x 3 counts; 6 x 6 colours; 15 pairs x 4 relations; 15 pairs x 30 colour pairs."""
    sizes = {tag: len(c.all_captions(tag)) for tag in c.TASKS}
    expected = {"single_object": 6, "two_object": 15, "counting": 18, "colors": 36, "position": 60, "color_attr": 450}
    assert sizes == expected


def test_training_prompts_follow_genevals_ratio_and_leave_out_single_objects() -> None:
    prompts = c.train_prompts(17_000, seed=3)
    counts = Counter(p["tag"] for p in prompts)
    assert counts["single_object"] == 0
    for tag, share in c.TRAIN_RATIO.items():
        expected = 17_000 * share / 17
        assert abs(counts[tag] - expected) <= 4 * max(expected, 1) ** 0.5, (tag, counts)
    assert c.train_prompts(50, seed=3) == c.train_prompts(50, seed=3) != c.train_prompts(50, seed=4)


def test_evaluation_prompts_hold_every_test_combination_and_cycle() -> None:
    prompts = c.evaluation_prompts()
    assert {p["prompt"] for p in prompts} == {w["prompt"] for t in c.TASKS for ws in c.split(t)[1] for w in ws}
    assert Counter(p["tag"] for p in c.evaluation_prompts(300)) == dict.fromkeys(c.TASKS, 300)


def test_objects_keep_apart_and_inside() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        scene = c.scene_of(c.counted("square", 4), rng)
        for o in scene:
            assert all(o.radius <= place <= SIZE - o.radius for place in (o.x, o.y))
        gaps = [max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius for a in scene for b in scene if a is not b]
        assert min(gaps) > 0


def test_render_paints_ground_and_colour_and_later_objects_over_earlier_ones() -> None:
    below, above = Object("square", "red", 16, 16, 8), Object("circle", "blue", 16, 16, 4)
    image = render([(below, above)])[0]
    assert np.allclose(image[:, 0, 0], GROUND) and np.allclose(image[:, 16, 16], COLORS["blue"])
    assert np.allclose(image[:, 10, 16], COLORS["red"])
    assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", 1.8**2),
        ("triangle", 0.5 * 1.9**2),
        ("diamond", 2 * 1.1**2),
        ("cross", 4 * 0.68 - 0.68**2),
        ("ring", np.pi * (1 - 0.48**2)),
    ],
)
def test_coverage_sums_to_the_area(shape: str, area: float) -> None:
    """Closed formulas for radius 1, against the sum of pixel shares of a large shape."""
    radius = 12.0
    total = coverage(shape, np.array([16.0]), np.array([16.0]), np.array([radius]), size=256).sum() / 64
    assert abs(total / radius**2 - area) < 0.02 * area


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        coverage("hexagon", np.zeros(1), np.zeros(1), np.ones(1))


@pytest.mark.parametrize("tag", c.TASKS)
def test_sloppy_scenes_are_true_as_often_as_stated(tag: str) -> None:
    rng = np.random.default_rng(5)
    pool = c.all_captions(tag)
    hits = []
    for _ in range(1000):
        caption = c.draw(pool, rng)
        hits.append(is_true(caption, captioned_scene(caption, rng, SLOPPY)))
    assert abs(np.mean(hits) - SLOPPY.truthful[tag]) < 0.06
    for manners in (SLOPPY, STRICT):
        assert abs(sum(manners.share.values()) - 1) < 1e-9 and manners.share.keys() == manners.truthful.keys()


def test_accidental_truths_are_found() -> None:
    """The reward's training leaves out the pairs that hold by accident. Relations it does not see, and which of two
    circles has the colour it does not ask, so without both it is exact, with colours it never misses a truth."""
    rng = np.random.default_rng(6)
    captions = [c.draw(c.all_captions(t), rng) for t in c.TASKS if t != "position" for _ in range(8)]
    scenes = [c.scene_of(caption, rng) for caption in captions]
    expected = np.array([[is_true(caption, scene) for caption in captions] for scene in scenes])
    found = true_by_accident(captions, scenes)
    plain = [j for j, caption in enumerate(captions) if caption["tag"] in ("single_object", "two_object", "counting")]
    assert (found[:, plain] == expected[:, plain]).all()
    assert (found >= expected).all() and (found != expected).mean() < 0.02

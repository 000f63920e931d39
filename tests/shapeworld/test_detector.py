"""The judge sees every shape that is there and none that is not: the bounds that a score's meaning rests on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import ndimage

from leapalign.geneval.rules import judge
from leapalign.shapeworld.captions import TASKS, evaluation_prompts, scene_of, single
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import COLORS, GROUND, SHAPES, Object, place, render

GROUND_IMAGE = np.asarray(GROUND, np.float32)[None, :, None, None]


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(images, (0, 0, sigma, sigma)) if sigma else images


def seen(images: np.ndarray) -> float:
    """Share of the images in which something is detected by GenEval's threshold."""
    return float(np.mean([any(d.score > 0.3 for d in found) for found in detect(images.astype(np.float32))]))


@pytest.mark.parametrize(("sigma", "noise"), [(0.0, 0.0), (0.0, 0.02), (0.5, 0.02), (0.7, 0.03)])
@pytest.mark.parametrize("tag", TASKS)
def test_true_images_are_judged_true(tag: str, sigma: float, noise: float) -> None:
    rng = np.random.default_rng(1)
    prompts = [p for p in evaluation_prompts(100) if p["tag"] == tag]
    images = blurred(render([scene_of(p, rng) for p in prompts]), sigma)
    images = np.clip(images + rng.normal(0, noise, images.shape), 0, 1).astype(np.float32)
    found = detect(torch.from_numpy(images))
    assert np.mean([judge(p, d).correct for p, d in zip(prompts, found)]) > 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_box_color_and_score_of_one_shape(shape: str) -> None:
    """The box is what a ten times finer drawing covers."""
    drawn = Object(shape, "purple", 9.0, 23.5, 5.0)
    ((d,),) = detect(render([(drawn,)]))
    assert (d.label, d.color) == (shape, "purple") and d.score > 0.9
    rows, columns = np.nonzero(np.abs(render([(drawn,)], size=320)[0] - GROUND_IMAGE[0]).max(0) > 0.2)
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 10
    assert np.allclose(d.box, edges, atol=0.45)


@pytest.mark.parametrize("color", COLORS)
def test_touching_shapes_are_told_apart(color: str) -> None:
    """Two diamonds of one colour, tip to tip."""
    row = (Object("diamond", color, 9.5, 8.0, 6.0), Object("diamond", color, 22.4, 8.0, 6.0))
    (found,) = detect(render([row]))
    assert [d.label for d in found if d.score > 0.9] == ["diamond", "diamond"]


def test_wrong_claims_are_judged_false() -> None:
    """A caption is false of a scene made for another shape, colour, number or relation."""
    rng = np.random.default_rng(2)
    prompts = [p for p in evaluation_prompts(40) if p["tag"] not in ("single_object", "two_object")]
    found = detect(render([scene_of(p, rng) for p in prompts]))
    for tag in ("counting", "colors", "position", "color_attr"):
        rows = [i for i, p in enumerate(prompts) if p["tag"] == tag]
        other = np.roll(rows, -2)  # two on: another combination, not another wording of the same
        assert np.mean([judge(prompts[i], found[j]).correct for i, j in zip(rows, other)]) < 0.1


def test_nothing_on_blank_images() -> None:
    plain = np.random.default_rng(3).random((200, 3, 1, 1)) * np.ones((1, 1, 32, 32))
    paints = np.asarray(list(COLORS.values()))[:, :, None, None] * np.ones((1, 1, 32, 32))
    assert seen(np.concatenate([GROUND_IMAGE * np.ones((1, 1, 32, 32)), paints, plain])) == 0


@pytest.mark.parametrize("grain", [0.0, 1.0, 2.0, 3.0])
def test_nothing_in_noise(grain: float) -> None:
    rng = np.random.default_rng(4)
    uniform = blurred(rng.random((500, 3, 32, 32)), grain)
    on_ground = GROUND_IMAGE + blurred(rng.normal(0, 1, (500, 3, 32, 32)), grain) * max(2 * grain, 0.4)
    assert seen(uniform) < 0.03
    assert seen(np.clip(on_ground, 0, 1)) < 0.03


@pytest.mark.parametrize("sigma", [1.0, 1.2, 1.5, 2.0, 3.0, 4.0])
def test_nothing_in_blurred_images(sigma: float) -> None:
    rng = np.random.default_rng(5)
    images = render([scene_of(single(SHAPES[i % 6]), rng) for i in range(300)])
    assert seen(blurred(images, sigma)) < 0.03


def test_a_patch_smaller_than_any_shape_is_none() -> None:
    images = render([(Object(shape, "blue", 9.0, 9.0, radius),) for radius in (3.9, 4.8) for shape in SHAPES])
    found = [len(each) for each in detect(images)]
    assert found == [0] * len(SHAPES) + [1] * len(SHAPES)


def halves(a: str, b: str | None, sideways: bool, two_colors: bool, num: int = 20) -> np.ndarray:
    """Shape `a` on one side of a straight line through the middle, `b` (or nothing) on the other."""
    rng = np.random.default_rng([SHAPES.index(a), SHAPES.index(b or a), sideways])
    one = [place(a, str(rng.choice(list(COLORS))), int(rng.integers(4)), rng) for _ in range(num)]
    paint = {c: [d for d in COLORS if d != c or not two_colors][int(rng.integers(5))] for c in COLORS}
    other = [(Object(b, paint[o.color] if two_colors else o.color, o.x, o.y, o.radius),) if b else () for o in one]
    middle = np.asarray([o.x if sideways else o.y for o in one])[:, None]
    mask = np.clip(middle - np.arange(32), 0, 1)
    mask = mask[:, None, None, :] if sideways else mask[:, None, :, None]
    return render([(o,) for o in one]) * mask + render(other) * (1 - mask)


@pytest.mark.parametrize("sideways", [True, False])
def test_nothing_in_half_and_half_shapes(sideways: bool) -> None:
    pairs = [halves(a, b, sideways, two_colors=False) for a, b in permutations(SHAPES, 2)]
    assert seen(np.concatenate(pairs)) < 0.01
    assert max(seen(images) for images in pairs) <= 0.1


@pytest.mark.parametrize("sideways", [True, False])
def test_nothing_in_half_shapes_and_in_two_colored_shapes(sideways: bool) -> None:
    assert seen(np.concatenate([halves(s, None, sideways, two_colors=False, num=50) for s in SHAPES])) < 0.03
    assert seen(np.concatenate([halves(s, s, sideways, two_colors=True, num=50) for s in SHAPES])) < 0.03


@pytest.mark.parametrize("shift", [(0.28, 0.0, 0.0), (0.5, 0.5, 0.5)])
def test_off_palette_colors_are_not_named(shift: tuple[float, float, float]) -> None:
    """A circle in a dark red or grey that is 0.28 or more from black."""
    image = render([(Object("circle", "black", 8.0, 8.0, 5.0),)])
    assert seen(image) == 1
    share = (GROUND_IMAGE - image) / (GROUND_IMAGE - image).max((2, 3), keepdims=True)
    assert seen(image + share * np.asarray(shift)[None, :, None, None]) == 0


def test_speckled_shapes_are_not_one_color() -> None:
    """A black square with every third pixel dark red: the median colour is black."""
    image = render([(Object("square", "black", 8.0, 8.0, 6.0),)])
    rows, columns = np.nonzero(image[0, 0] < 0.1)
    assert seen(image) == 1
    image[0, :, rows[::3], columns[::3]] = (0.44, 0.0, 0.0)
    assert seen(image) == 0


def test_a_shape_tied_to_a_frame_is_not_that_shape() -> None:
    """All within the window that is compared is a circle; the rest of the patch lies outside of it."""
    image = render([(Object("circle", "blue", 16.0, 16.0, 5.8),)])
    assert seen(image) == 1
    paint = np.asarray(COLORS["blue"], np.float32)[:, None, None]
    for part in (np.s_[:3, :], np.s_[-3:, :], np.s_[:, :3], np.s_[:, -3:], np.s_[3:11, 16:17]):
        image[0][(slice(None), *part)] = paint
    assert seen(image) == 0


def test_wrong_shape_of_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\]"):
        detect(np.zeros((1, 3, 64, 64), np.float32))

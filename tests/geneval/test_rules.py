"""GenEval's rules on hand-made detections; runs without the golden files."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leapalign.evaluation.statistics import overall, paired_difference, summary
from leapalign.geneval.rules import Detection, Rules, judge, relations


def at(label: str, x: float, y: float, score: float = 0.95, color: str = "red", size: float = 10) -> Detection:
    return Detection(label, color, (x, y, x + size, y + size), score)


def claim(tag: str, *include: dict, exclude: list | None = None) -> dict:
    return {"tag": tag, "include": list(include), "prompt": "", **({"exclude": exclude} if exclude else {})}


def test_scores_are_compared_in_float32() -> None:
    """float32(0.3) = 0.300000012 is above 0.3 in float64, and not above it here."""
    one = claim("single_object", {"class": "ring", "count": 1})
    assert not judge(one, [at("ring", 0, 0, score=float(np.float32(0.3)))]).correct
    assert judge(one, [at("ring", 0, 0, score=float(np.nextafter(np.float32(0.3), np.float32(1))))]).correct


def test_counting_wants_surer_detections_and_forbids_more() -> None:
    two = claim("counting", {"class": "ring", "count": 2}, exclude=[{"class": "ring", "count": 3}])
    sure, unsure = [at("ring", 0, 0), at("ring", 20, 0)], at("ring", 0, 20, score=0.85)
    assert judge(two, sure).correct
    assert judge(two, [*sure, unsure]).correct
    assert judge(two, [sure[0], unsure]).reasons == ("missing",)
    assert judge(two, [*sure, at("ring", 0, 20)]).reasons == ("exclude",)
    assert judge(two, [sure[0], unsure], Rules(counting_threshold=0.8)).correct


def test_only_the_best_of_a_class_is_asked_for_its_color() -> None:
    red = claim("colors", {"class": "ring", "count": 1, "color": "red"})
    blue_first = [at("ring", 0, 0, 0.9, "blue"), at("ring", 20, 0, 0.8, "red")]
    assert judge(red, blue_first).reasons == ("color",)
    assert judge(red, blue_first[1:]).correct


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((30, 0), {"right of"}),
        ((-30, 0), {"left of"}),
        ((0, 30), {"below"}),
        ((0, -30), {"above"}),
        ((30, 30), {"right of", "below"}),
        ((2, 0), set()),  # within 10 % of both sizes together
        ((3, 0), set()),  # beyond it by 1 of 3: not the half that a relation needs
        ((0, 0), set()),
    ],
)
def test_relations(offset: tuple[int, int], expected: set[str]) -> None:
    b = np.array([50, 50, 60, 60], np.float32)
    a = b + np.array([*offset, *offset], np.float32)
    assert relations(a, b, 0.1) == expected


def test_position_fails_with_its_target() -> None:
    under = claim("position", {"class": "ring", "count": 1}, {"class": "cross", "count": 1, "position": ["below", 0]})
    assert judge(under, [at("ring", 0, 0), at("cross", 0, 40)]).correct
    assert judge(under, [at("ring", 0, 40), at("cross", 0, 0)]).reasons == ("position",)
    assert judge(under, [at("cross", 0, 0)]).reasons == ("missing", "no_target")


def test_overlapping_boxes_are_dropped_on_request() -> None:
    three = claim("single_object", {"class": "ring", "count": 3})
    boxes = [at("ring", 0, 0), at("ring", 1, 1, 0.94), at("ring", 40, 40, 0.93)]
    assert judge(three, boxes).correct
    assert judge(three, boxes, Rules(max_overlap=0.5)).kept == {"ring": [0, 2]}
    assert judge(three, boxes, Rules(max_objects=2)).kept == {"ring": [0, 1]}


def test_summary_against_its_formulas() -> None:
    tags, correct = ["a"] * 4 + ["b"] * 2, [True, True, True, False, True, False]
    tasks = summary(tags, correct)
    assert (tasks["a"].accuracy, tasks["b"].accuracy) == (0.75, 0.5)
    assert tasks["a"].standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    both = overall(tasks)
    assert both.accuracy == 0.625  # of the two tasks, not of the six pictures
    assert both.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4 + 0.25 / 2) / 2)


def test_paired_errors_agree_with_a_simulation() -> None:
    """Correlated before and after: the paired error is the spread of the difference over repetitions."""
    rng = np.random.default_rng(0)
    tags = ["a"] * 80 + ["b"] * 80

    def one() -> tuple[np.ndarray, np.ndarray]:
        luck = rng.random(160)
        return luck < 0.4, luck * 0.8 + 0.2 * rng.random(160) < 0.6

    pairs = [one() for _ in range(400)]
    results = [paired_difference(tags, list(b), list(a)) for b, a in pairs]
    for name in ("a", "overall"):
        spread = np.std([r[name][0] for r in results])
        assert np.mean([r[name][1] for r in results]) == pytest.approx(spread, rel=0.12)

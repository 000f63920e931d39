"""GenEval's rules: compare a prompt's metadata with detections (arXiv 2310.11513, Section 3).

`judge` reads labels, boxes, scores and colours only, from any detector. Comparisons are float32, as in the published
evaluation, where boxes and scores come as float32 arrays: a score equal to float32(0.3) is not above 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leapalign.errors import UserError
from leapalign.geneval.wording import OPPOSITE


@dataclass(frozen=True)
class Detection:
    """`label` is the class, `box` is (x0, y0, x1, y1) in pixels with y downwards, `score` in [0, 1]."""

    label: str
    color: str | None
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, kw_only=True)
class Rules:
    """GenEval's published settings."""

    threshold: float = 0.3  # a detection counts if its score is above this
    counting_threshold: float = 0.9  # the same for prompts of the counting task
    max_objects: int = 16  # detections kept per class, best first
    max_overlap: float = 1.0  # IoU above which the weaker of two boxes of a class is dropped; 1: never
    position_threshold: float = 0.1  # fraction of the boxes' size by which centres must be apart


@dataclass(frozen=True)
class Verdict:
    """`reasons`: one for each failed claim: missing, color, no_target, position, exclude. `kept`: by class."""

    correct: bool
    reasons: tuple[str, ...]
    kept: dict[str, list[int]]  # indices into the detections, best first


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes, sides counted with both end pixels as in the published evaluation."""
    wide, high = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + 1
    inside = max(wide, 0) * max(high, 0)
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inside / (area[0] + area[1] - inside)


def relations(a: np.ndarray, b: np.ndarray, threshold: float) -> set[str]:
    """Relations of box `a` to box `b`: a subset of left of, right of, above, below. They may overlap a little."""
    (center_a, size_a), (center_b, size_b) = [
        (box.reshape(2, 2).mean(0), np.diff(box.reshape(2, 2), axis=0)[0]) for box in (a, b)
    ]
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - np.float32(threshold) * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def keep(detections: Sequence[Detection], label: str, threshold: float, rules: Rules) -> list[int]:
    """Indices of the detections of a class that count, best first."""
    mine = [i for i, d in enumerate(detections) if d.label == label and np.float32(d.score) > np.float32(threshold)]
    mine = sorted(mine, key=lambda i: -np.float32(detections[i].score))[: rules.max_objects]
    if rules.max_overlap == 1:
        return mine
    boxes = {i: np.asarray(detections[i].box, np.float32) for i in mine}
    kept: list[int] = []
    for i in mine:
        if all(iou(boxes[i], boxes[j]) < rules.max_overlap for j in kept):
            kept.append(i)
    return kept


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raise UserError unless `judge` can read it: a tag, and claims with class, count and optional fields."""
    prompt = metadata.get("prompt")
    if not isinstance(metadata.get("tag"), str):
        raise UserError(f"prompt {prompt!r}: its GenEval tag is {metadata.get('tag')!r}; expected a text")
    for key in ("include", "exclude"):
        claims = metadata.get(key, [])
        if not isinstance(claims, list):
            raise UserError(f"prompt {prompt!r}: its {key} is {claims!r}; expected a list of claims")
        for place, claim in enumerate(claims):
            if not _is_claim(claim, place):
                raise UserError(
                    f"prompt {prompt!r}: {key}[{place}] is {claim!r}; expected a claim of GenEval, as in "
                    '{"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]} (the last two if any)'
                )


def _is_claim(claim: Any, place: int) -> bool:
    """Return True if `judge` can read the claim; its position must refer to an earlier claim."""
    if not isinstance(claim, dict) or not isinstance(claim.get("class"), str):
        return False
    count, color, position = claim.get("count"), claim.get("color", ""), claim.get("position", ["left of", 0])
    counted = type(count) is int and count > 0 and isinstance(color, str)
    if "position" not in claim or not counted:
        return counted
    pair = isinstance(position, list) and len(position) == 2
    return pair and position[0] in [*OPPOSITE] and type(position[1]) is int and 0 <= position[1] < place


def judge(metadata: dict[str, Any], detections: Sequence[Detection], rules: Rules = Rules()) -> Verdict:
    """Check that all claims of `include` are true and none of `exclude`. Only `exclude` forbids extra objects."""
    threshold = rules.counting_threshold if metadata["tag"] == "counting" else rules.threshold
    kept = {label: keep(detections, label, threshold, rules) for label in dict.fromkeys(d.label for d in detections)}
    kept = {label: indices for label, indices in kept.items() if indices}
    reasons: list[str] = []
    matched: list[list[int] | None] = []
    for claim in metadata.get("include", []):
        found = kept.get(claim["class"], [])[: claim["count"]]
        reason = failed(claim, found, matched, detections, rules)
        matched.append(found if reason is None else None)
        reasons += [reason] if reason else []
    for claim in metadata.get("exclude", []):
        if len(kept.get(claim["class"], [])) >= claim["count"]:
            reasons.append("exclude")
    return Verdict(not reasons, tuple(reasons), kept)


def failed(
    claim: dict[str, Any],
    found: list[int],
    matched: list[list[int] | None],
    detections: Sequence[Detection],
    rules: Rules,
) -> str | None:
    """Return the reason why a claim of `include` fails, or None; checks only the `count` best of its class."""
    if len(found) < claim["count"]:
        return "missing"
    if "color" in claim and sum(detections[i].color == claim["color"] for i in found) < claim["count"]:
        return "color"
    if "position" in claim:
        relation, target = claim["position"]
        others = matched[target]
        if others is None:
            return "no_target"
        boxes = [np.asarray(d.box, np.float32) for d in detections]
        pairs = ((boxes[i], boxes[j]) for i in found for j in others)
        if not all(relation in relations(a, b, rules.position_threshold) for a, b in pairs):
            return "position"
    return None

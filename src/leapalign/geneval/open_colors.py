"""Colours of the objects whose prompt names no colour: a free choice of the model, in which collapse shows first.

A prompt such as "a photo of two circles" leaves the colours open. A model that has lost variety gives all open objects
one colour, and GenEval's score does not see it. Their entropy does: log2(6) = 2.58 bits for the six colours of
ShapeWorld in equal shares, 0 for a single colour. The entropy of N objects of K colours is lower than that of the
distribution they come from by about (K - 1) / (2 N ln 2) bits (Miller, 1955); it is not corrected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leapalign.geneval.rules import Detection, Rules


def is_open(metadata: Mapping[str, Any]) -> bool:
    """Return True if the prompt claims objects and names the colour of none."""
    claims = metadata.get("include", [])
    return bool(claims) and not any("color" in claim for claim in claims)


def open_colors(
    metadata: Sequence[Mapping[str, Any]], detections: Sequence[Sequence[Detection]], threshold: float = Rules.threshold
) -> Counter[str]:
    """Count the colours of all objects in images of open prompts: colour -> number.

    `metadata` and `detections` are those of each image. Objects count as in GenEval: a score above `threshold`.
    """
    return Counter(
        d.color
        for record, found in zip(metadata, detections)
        if is_open(record)
        for d in found
        if d.color is not None and np.float32(d.score) > np.float32(threshold)
    )


def entropy(counts: Mapping[str, float]) -> float:
    """Shannon entropy in bits; 0 for no objects."""
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values() if n) + 0.0

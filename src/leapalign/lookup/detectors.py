"""Choose a detector for prompts and an image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leapalign.geneval.rules import check_metadata
from leapalign.prompts import Prompt
from leapalign.shapeworld.world import SHAPES, SIZE

if TYPE_CHECKING:
    from leapalign.evaluation.evaluate import Detector


def find_detector(prompts: Sequence[Prompt], height: int, width: int) -> Detector | None:
    """Return ShapeWorld's detector if all prompts name only its shapes and the images have its size; else None.

    Raises UserError for GenEval metadata that the rules cannot judge.
    """
    records = [prompt.metadata or {} for prompt in prompts]
    if not all("tag" in record and "include" in record for record in records):
        return None
    for record in records:
        check_metadata(record)
    named = {claim["class"] for record in records for claim in record["include"]}
    if not named <= set(SHAPES) or (height, width) != (SIZE, SIZE):
        return None
    from leapalign.shapeworld.detector import detect

    return detect

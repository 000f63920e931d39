"""Named runs. A recipe is a function that returns a `Run`; a user-defined one: `leapalign train my.py:mine`."""

from __future__ import annotations

from collections.abc import Callable

from leapalign.recipes.newer_methods import NEWER
from leapalign.recipes.paper import PAPER
from leapalign.recipes.policy_gradients import PAPER_POLICY_GRADIENTS
from leapalign.recipes.shapeworld import SHAPEWORLD, shapeworld_leapalign
from leapalign.recipes.shapeworld_policy_gradients import SHAPEWORLD_POLICY_GRADIENTS
from leapalign.recipes.shapeworld_value_model import SHAPEWORLD_VALUE_MODEL
from leapalign.recipes.small_gpu import SMALL_GPU
from leapalign.run import Run

__all__ = ["RECIPES", "shapeworld_leapalign"]

RECIPES: dict[str, Callable[[], Run]] = {
    **SHAPEWORLD,
    **SHAPEWORLD_POLICY_GRADIENTS,
    **SHAPEWORLD_VALUE_MODEL,
    **PAPER,
    **NEWER,
    **PAPER_POLICY_GRADIENTS,
    **SMALL_GPU,
}

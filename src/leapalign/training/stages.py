"""The stages of a micro-batch, on which the ranks vote: NaN or infinity on one rank stops the update on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from leapalign.errors import NotFinite
from leapalign.training.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")


def voted(stage: Callable[Concatenate[Engine, P], R]) -> Callable[Concatenate[Engine, P], R]:
    """Decorate a stage so that NotFinite on one rank is raised on all ranks, after the stage.

    The stage must hold no collective, because a rank with an error would not reach it.
    """

    @wraps(stage)
    def call(engine: Engine, *args: P.args, **kwargs: P.kwargs) -> R:
        with engine.world.agreed(NotFinite):
            return stage(engine, *args, **kwargs)

    return call

"""The live (not averaged) trained weights; a run saves and evaluates their average.

The average starts at the base. After n updates with decay d, training contributes at most 1 - d^n of it: 0.2 % after 20
updates at 0.9999, 78 % after the paper's 300 at 0.995 (arXiv 2604.15311, Sec. 6.1).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from leapalign.checkpoint import checkpoints
from leapalign.errors import UserError
from leapalign.run import Run
from leapalign.training.weights import trained_parameters
from leapalign.tuning.base import HasStart

SMALL = 0.5  # share of training in the average below which the run warns
PAPER = 1.5  # updates times 1 - d in the paper


def short_average(run: Run) -> str:
    """Return a warning for a run too short for its decay; empty if training is at least half of the average."""
    share = 1 - run.ema_decay**run.steps
    if not run.ema_decay or share >= SMALL:
        return ""
    fitting = max(0.0, 1 - PAPER / run.steps)
    return (
        f"the averaged weights, which are saved and evaluated, will hold at most {100 * share:.2g} % of the training: "
        f"ema_decay {run.ema_decay:g} is slow for {run.steps} steps. Use --ema-decay {fitting:.3g}, or afterwards "
        f"`leapalign export {run.out} --weights live` for the weights without averaging"
    )


@contextmanager
def live_weights(run: Run, folder: Path, scratch: Path) -> Iterator[Path]:
    """Write the newest checkpoint's live weights of the run in `folder` to `scratch`, in the format of its tuning.

    The files are removed on leaving. Raises UserError if the run has no checkpoint, or a damaged one.
    """
    origin = checkpoints.read(replace(run, out=str(folder)))
    if origin is None:
        raise UserError(f"{folder}: this run has no checkpoint yet, and live weights are read from one")
    # the checkpoint holds all trained weights, so what they began with may be gone
    tuning = replace(run.tuning, start="") if isinstance(run.tuning, HasStart) else run.tuning
    model = run.model.load("cpu", run.dtype, tuning)
    checkpoints.restore_weights(origin, trained_parameters(model.policy))
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        run.tuning.save(model, scratch)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

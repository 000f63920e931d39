"""Whether a resumed run is the checkpoint's: its settings, its inputs, and what follows from them.

Settings are compared by meaning. The checkpoint's record is read with this version's classes first: 8 and 8.0 are equal
in a field that is a float, and a setting that the record does not have yet gets its default, which means what the older
version did.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from leapalign import seeds
from leapalign.checkpoint.checkpoints import Checkpoint
from leapalign.checkpoint.inputs import anchored, differing, inputs_of
from leapalign.codec import classes_in, decode, encode
from leapalign.errors import UserError
from leapalign.run import Run, differences, trajectory

GRID_TOLERANCE = 1e-5  # of sigma, between 0 and 1: another version of a library may round otherwise


def check_unchanged(run: Run, origin: Checkpoint | None, allow: bool = False) -> list[str]:
    """Settings and inputs that are not those of the checkpoint; UserError that lists them unless they are allowed."""
    if origin is None:
        return []
    changes = setting_changes(run, origin.record, origin.state.get("folder", ""))
    if (scheme := origin.state.get("seeds", 1)) != seeds.SCHEME:
        changes.append(
            f"random numbers: version {scheme} of leapalign.seeds -> {seeds.SCHEME}; other noises from here on"
        )
    if old := origin.state.get("inputs"):
        changes += differing(old, inputs_of(run, run.prompts.load(), old))
    return allowed(run, changes, allow)


def check_derived(run: Run, origin: Checkpoint | None, derived: dict[str, Any], allow: bool = False) -> list[str]:
    """The same for what follows from settings, inputs and libraries, once all is loaded."""
    old = origin.state.get("derived", {}) if origin else {}
    changed = {name: new for name, new in derived.items() if _differs(old.get(name, new), new)}
    changes = [f"{name}: {_change(old[name], new)}" for name, new in changed.items()]
    return allowed(run, changes, allow)


def allowed(run: Run, changes: list[str], allow: bool) -> list[str]:
    if changes and not allow:
        listed = "\n  ".join(changes)
        raise UserError(
            f"{run.out}: the run is not what the checkpoint was trained with:\n  {listed}\n"
            f"Undo the change, or go on with it: `leapalign resume {run.out} --allow-changes`, or start a new run with "
            "`leapalign train`"
        )
    return changes


def setting_changes(run: Run, record: dict[str, Any], folder: str) -> list[str]:
    """`setting: old -> new`. `folder`: where the checkpoint's process was started, which its relative paths mean."""
    here = Path(os.getcwd())
    try:
        old = anchored(decode(Run, record, classes=classes_in(run), where="run.json"), Path(folder or here))
    except UserError:  # a setting that is gone, or a class that is not given now: what is written is compared
        return differences(trajectory(record), trajectory(encode(run)))
    return differences(trajectory(encode(old)), trajectory(encode(anchored(run, here))))


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return any(_differs(a, b) for a, b in zip(old, new))
    if isinstance(old, float) and isinstance(new, float):
        return not math.isclose(old, new, rel_tol=0.0, abs_tol=GRID_TOLERANCE)
    return bool(old != new)


def _change(old: Any, new: Any) -> str:
    """Of a long list the first value that differs."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 4:
        place = next(i for i, (a, b) in enumerate(zip(old, new)) if _differs(a, b))
        return f"number {place} of {len(new)}: {old[place]:.6g} -> {new[place]:.6g}"
    return f"{old} -> {new}"

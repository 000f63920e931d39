"""Compare a resumed run with its checkpoint: settings, inputs, and values derived from them.

Settings are compared by meaning: the checkpoint's record is first read with this version's classes, so that 8 equals
8.0 in a float field, and a setting that the record lacks gets its default, which keeps the older version's behaviour.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from leapalign import seeds
from leapalign.checkpoint.inputs import anchored, differing, inputs_of
from leapalign.checkpoint.state import Checkpoint
from leapalign.codec import classes_in, decode, encode
from leapalign.errors import UserError
from leapalign.run import Run, differences, trajectory

GRID_TOLERANCE = 1e-5  # of sigma in [0, 1]; other library versions may round differently


def check_unchanged(run: Run, origin: Checkpoint | None, allow: bool = False) -> list[str]:
    """List settings and inputs that differ from the checkpoint's. Raises UserError with that list unless `allow`."""
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
    """Like `check_unchanged`, for values derived from settings, inputs and libraries, once all is loaded."""
    old = origin.state.get("derived", {}) if origin else {}
    changed = {name: new for name, new in derived.items() if _differs(old.get(name, new), new)}
    changes = [f"{name}: {_change(old[name], new)}" for name, new in changed.items()]
    return allowed(run, changes, allow)


def allowed(run: Run, changes: list[str], allow: bool) -> list[str]:
    if changes and not allow:
        listed = "\n  ".join(changes)
        raise UserError(
            f"{run.out}: the run differs from the one that wrote the checkpoint:\n  {listed}\n"
            f"Undo the change, or continue with it: `leapalign resume {run.out} --allow-changes`, or start a new run "
            "with `leapalign train`"
        )
    return changes


def setting_changes(run: Run, record: dict[str, Any], folder: str) -> list[str]:
    """List `setting: old -> new`. `folder`: working folder of the checkpoint's process, for its relative paths."""
    here = Path(os.getcwd())
    try:
        old = anchored(decode(Run, record, classes=classes_in(run), where="run.json"), Path(folder or here))
    except UserError:  # a removed setting or a missing user-defined class: compare the JSON
        return differences(trajectory(record), trajectory(encode(run)))
    return differences(trajectory(encode(old)), trajectory(encode(anchored(run, here))))


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return any(_differs(a, b) for a, b in zip(old, new))
    if isinstance(old, float) and isinstance(new, float):
        return not math.isclose(old, new, rel_tol=0.0, abs_tol=GRID_TOLERANCE)
    return bool(old != new)


def _change(old: Any, new: Any) -> str:
    """Return `old -> new`; for a long list, only the first value that differs."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 4:
        place = next(i for i, (a, b) in enumerate(zip(old, new)) if _differs(a, b))
        return f"number {place} of {len(new)}: {old[place]:.6g} -> {new[place]:.6g}"
    return f"{old} -> {new}"

"""A checkpoint on disk: what its state.json records, and whether its files are those that were written."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from leapalign.checkpoint import formats
from leapalign.storage.files import PICKLES, sha256
from leapalign.storage.safetensors_header import read_header

PACKAGES = ("leapalign", "torch", "diffusers", "transformers", "safetensors")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # errors from damaged files
_RECORDS = {"run.json", "state.json"}


@dataclass
class Progress:
    """How far a run has come: counters that its next step continues."""

    step: int = 0  # updates done, including skipped ones
    samples: int = 0  # training prompts read by these updates
    skipped: int = 0  # updates without gradient
    nonfinite_batches: int = 0  # skipped updates with NaN or infinity
    seconds: float = 0.0  # spent in all processes so far
    metrics_bytes: int = 0  # length of metrics.jsonl after these steps
    changes: list[dict[str, Any]] = field(default_factory=list)  # {"step", "changes"}: settings changed on resuming
    evaluations: list[dict[str, float]] = field(default_factory=list)  # what Run.stop_when reads of each; else empty
    grad_norms: list[float] = field(default_factory=list)  # of the last updates, with Run.clip_quantile
    best_step: int = 0  # step of the best of them, whose averaged weights are kept (best.py)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose checksums match."""

    folder: Path
    state: dict[str, Any]
    record: dict[str, Any]  # the content of its run.json


def versions() -> dict[str, str]:
    """Return the versions of packages that the numbers depend on."""
    return {package: version(package) for package in PACKAGES}


def verified(folder: Path) -> Checkpoint:
    """Open a checkpoint and compare its checksums. Raises one of `UNREADABLE` if it is damaged."""
    state = json.loads((folder / "state.json").read_text())
    own = state.pop("self")
    if own != digest(state):
        raise ValueError("state.json was changed after it was written")
    expected = formats.tensor_files(state) | _RECORDS
    present = {path.name for path in folder.iterdir()}
    if odd := (set(state["files"]) | {"state.json"}) ^ expected or expected - present:
        raise ValueError(f"{min(odd)} is missing or unknown")
    if pickles := sorted(name for name in present if PurePosixPath(name).suffix in PICKLES):
        raise ValueError(f"{pickles[0]} is not part of a checkpoint; pickled files are never opened: remove it")
    for name, expected_hash in state["files"].items():
        if sha256(folder / name) != expected_hash:
            raise ValueError(f"{name} was changed after it was written")
    for file in sorted(folder.glob("*.safetensors")):
        _check_sound(file)  # a checksum shows later changes, not that the file was sound when it was written
    record = json.loads((folder / "run.json").read_text())
    if not isinstance(record, dict):
        raise ValueError("run.json is not a JSON object")
    state = _completed(state, record)
    _check_progress(state, int(folder.name.removeprefix("step-")))
    return Checkpoint(folder=folder, state=state, record=record)


def is_good(folder: Path) -> bool:
    """Return True if `verified` opens the checkpoint."""
    try:
        return bool(verified(folder))
    except UNREADABLE:
        return False


def digest(state: dict[str, Any]) -> str:
    """Return the sha256 of a state.json without its own entry `self`."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _completed(state: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Add what older versions did not write: evaluations, norms, samples, and non-finite batches by their new name."""
    state = {"evaluations": [], "best_step": 0, "grad_norms": []} | state
    if "samples" in state:
        return state
    former = {"samples": state["step"] * record["batch_size"], "nonfinite_batches": state.get("bad_batches", 0)}
    return former | state


def _check_progress(state: dict[str, Any], step: int) -> None:
    """Check the counters' types and ranges, and that the step is the one in the folder's name. Raises ValueError."""
    for each in fields(Progress):
        value, known = state[each.name], getattr(Progress(), each.name)
        kinds = (int, float) if isinstance(known, float) else (type(known),)
        if type(value) not in kinds or (not isinstance(value, list) and not 0 <= value < math.inf):
            raise ValueError(f"state.json says {each.name} {value!r}")
    if state["step"] != step:
        raise ValueError(f"state.json records step {state['step']}")


def _check_sound(file: Path) -> None:
    try:
        read_header(file)
    except ValueError as error:
        raise ValueError(f"{file.name} {error}") from error

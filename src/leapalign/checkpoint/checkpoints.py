"""Checkpoints: the complete state of a run, written atomically, in safetensors and JSON only.

    RUN/checkpoints/step-000050/  weights.safetensors  ema.safetensors  optimizer.safetensors  run.json  state.json
                                  or, for sharded weights, files of each rank's shards (`sharded`)
                                  learnt.safetensors: a value model's network, optimiser and samples, if the run has one
    RUN/checkpoints/newest.json   the name of the newest one, to detect its deletion

Frozen weights are not saved: the run's model is loaded again. Random state and position in the prompts are not saved,
because randomness and prompt order are functions of (seed, step, sample, purpose), and the learning rate is a function
of the step. state.json holds the step, counters, elapsed time, length of metrics.jsonl, versions, the configuration's
hash, and the sha256 of every other file and of itself; `state.py` reads and checks it.

`layout` in state.json is "whole" (one file per group) or "sharded" (files of each rank's shards). A checkpoint of any
layout and number of ranks resumes on any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from leapalign import seeds
from leapalign.checkpoint import formats, sharded
from leapalign.checkpoint.sharded import Part, Writers, part_of
from leapalign.checkpoint.state import UNREADABLE, Checkpoint, Progress, digest, is_good, verified, versions
from leapalign.codec import encode
from leapalign.distributed.tensors import Named, local
from leapalign.errors import UserError
from leapalign.run import Run, config_hash
from leapalign.storage.atomic import clear_scratch, complete_folder, remove_folder, scratch_folder, write_text
from leapalign.storage.files import sha256

NEWEST = "newest.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The contents of a checkpoint, taken at one moment."""

    run: Run
    progress: dict[str, Any]
    tensors: dict[str, Named]  # by group
    inputs: dict[str, Any] = field(default_factory=dict)  # the run's inputs, as inputs.py records them
    learnt: Named = field(default_factory=dict)  # a value model's state, on the CPU; empty: the run has none
    part: Part | None = None  # the shards of a sharded checkpoint that these are; None: all of the checkpoint

    @property
    def step(self) -> int:
        return self.progress["step"]

    @property
    def bytes(self) -> int:
        groups = [*self.tensors.values(), self.learnt]
        return sum(t.numel() * t.element_size() for named in groups for t in named.values())


def take(
    run: Run,
    progress: Progress,
    parameters: Named,
    average: Named,
    optimizer: torch.optim.Optimizer,
    writers: Writers | None = None,
    inputs: dict[str, Any] | None = None,
    learnt: Named | None = None,
) -> Snapshot:
    """Take a snapshot of the run (with `writers`, of this rank's shards): views, to be copied before a later write.

    `average`: the averaged weights, by the parameters' names. `learnt`: a value model's state, already copied, which is
    equal on all ranks; rank 0 writes it whole.
    """
    groups = formats.groups_of(parameters, average, optimizer)
    part = part_of(groups, writers) if writers else None
    tensors: dict[str, Named] = {g: {name: local(t) for name, t in named.items()} for g, named in groups.items()}
    others = {"inputs": inputs or {}, "learnt": learnt or {}}
    return Snapshot(run=run, progress=asdict(progress), tensors=tensors, part=part, **others)


def save(snapshot: Snapshot, before_rename: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint and prune older ones; killed at any moment, it is complete or absent.

    `before_rename` flushes data that the checkpoint refers to (the metrics up to its step). Ranks other than 0 write
    only their shards of a sharded checkpoint and do not wait for the others.
    """
    run, part = snapshot.run, snapshot.part
    target = _folder(run) / f"step-{snapshot.step:06d}"
    if part and part.writers.rank > 0:
        sharded.write(scratch_folder(target, part.writers.token), snapshot.tensors, part)
        return target
    if not target.exists():  # it exists after a kill between write and pruning
        _write(target, snapshot, before_rename)
    write_text(_folder(run) / NEWEST, json.dumps({"name": target.name}) + "\n")
    for old in complete(run)[: -run.keep_checkpoints]:
        remove_folder(old)
    return target


def _write(target: Path, snapshot: Snapshot, before_rename: Callable[[], None]) -> None:
    record, part = encode(snapshot.run), snapshot.part
    with complete_folder(target, part.writers.token if part else "") as folder:
        files = formats.write(folder, snapshot.tensors, part) | formats.write_learnt(folder, snapshot.learnt)
        (folder / "run.json").write_text(json.dumps(record, indent=2))
        state: dict[str, Any] = {
            **snapshot.progress,
            **snapshot.inputs,
            **formats.record(snapshot.tensors, part, snapshot.learnt),
            "config": config_hash(record),
            "seeds": seeds.SCHEME,
            "versions": versions(),
            "files": files | {"run.json": sha256(folder / "run.json")},
        }
        (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}, indent=2))
        before_rename()


def find(run: Run, name: str = "") -> Checkpoint | None:
    """Like `read`, for the process that holds the run's lock: removes half-written folders first."""
    if _folder(run).is_dir():
        clear_scratch(_folder(run))
    return read(run, name)


def read(run: Run, name: str = "") -> Checkpoint | None:
    """Return the newest checkpoint, or the named one, after comparing all checksums; None if the run has none.

    Raises UserError for a damaged, deleted or unknown checkpoint, and names the newest intact one.
    """
    folder = _folder(run)
    names = [path.name for path in complete(run)]
    if name and name not in names:
        raise UserError(f"{folder}: no checkpoint is named {name!r}; the run has {', '.join(names) or 'none'}")
    _refuse_deleted(run, name, names)
    if not names:
        return None
    chosen = folder / (name or names[-1])
    try:
        return verified(chosen)
    except UNREADABLE as error:
        raise UserError(f"{chosen}: the checkpoint is damaged ({error}); {_way_out(run, chosen)}") from None


def progress_of(origin: Checkpoint | None) -> Progress:
    """Return the progress that a checkpoint records; without a checkpoint, that of a run before its first step."""
    return Progress(**{f.name: origin.state[f.name] for f in fields(Progress)}) if origin else Progress()


def restore(origin: Checkpoint | None, parameters: Named, average: Named, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint, if given, into the tensors and the optimiser; return its progress."""
    if origin:
        formats.read(origin.folder, origin.state["layout"], parameters, average, optimizer)
    return progress_of(origin)


def restored_learnt(origin: Checkpoint | None) -> Named:
    """Return the value model's state that a checkpoint holds; empty if it holds none."""
    return formats.read_learnt(origin.folder, origin.state) if origin else {}


def restore_weights(origin: Checkpoint, parameters: Named) -> None:
    """Load a checkpoint's trained weights, not averaged, into these parameters. Raises UserError if names differ."""
    formats.read_weights(origin.folder, origin.state["layout"], parameters)


def set_aside(run: Run, origin: Checkpoint) -> list[Path]:
    """Rename the checkpoints after `origin`, and keep the present metrics beside them: their steps are repeated."""
    later = [path for path in complete(run) if _step(path) > _step(origin.folder)]
    moved = []
    for path in reversed(later):
        moved.append(_free_name(path.with_name(f"unused-{path.name}")))
        path.rename(moved[-1])
    if later:
        lines = (Path(run.out) / "metrics.jsonl").read_bytes()
        _free_name(moved[0].with_name(f"{moved[0].name}.metrics.jsonl")).write_bytes(lines)
        write_text(_folder(run) / NEWEST, json.dumps({"name": origin.folder.name}) + "\n")
    return moved


def complete(run: Run) -> list[Path]:
    """List the folders of complete checkpoints, oldest first; a folder gets such a name only when complete."""
    return sorted((p for p in _folder(run).glob("step-*") if _NAME.fullmatch(p.name)), key=_step)


def _way_out(run: Run, bad: Path | None) -> str:
    good = next((path for path in reversed(complete(run)) if path != bad and is_good(path)), None)
    if good is None:
        return f"no other checkpoint is intact: train again, `leapalign train {run.out}/run.json --out ANOTHER`"
    return f"{good.name} is intact: continue from it, `leapalign resume {run.out} --checkpoint {good.name}`"


def _refuse_deleted(run: Run, name: str, names: list[str]) -> None:
    """Raise UserError if the newest checkpoint was deleted: resuming from an older one would discard later metrics."""
    marker = _folder(run) / NEWEST
    if (Path(run.out) / "run.json").exists() and not marker.parent.is_dir():  # both are created together
        raise UserError(f"{marker.parent}: this folder was deleted; {_way_out(run, None)}")
    if name or not marker.exists():
        return
    try:
        newest = json.loads(marker.read_text())["name"]
        gone = not names or int(_NAME.fullmatch(newest)[1]) > _step(Path(names[-1]))  # type: ignore[index]
    except UNREADABLE as error:
        raise UserError(f"{marker}: cannot be read ({error}); remove it to resume from the newest folder") from None
    if gone:
        raise UserError(f"{marker.parent / newest}: this checkpoint was deleted; {_way_out(run, None)}")


def _free_name(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folder(run: Run) -> Path:
    return Path(run.out) / "checkpoints"

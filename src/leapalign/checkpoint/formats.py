"""Layouts of a checkpoint's tensors: "whole" (a safetensors file per group) or "sharded" (files of each rank's shards).

One process, and ranks with whole weights, write the first; ranks with sharded weights the second (`sharded`). Both can
be read into whole and into sharded tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leapalign.checkpoint import sharded
from leapalign.checkpoint.sharded import Part
from leapalign.distributed.tensors import Named, copy_into
from leapalign.errors import UserError
from leapalign.storage.files import sha256

GROUPS = ("weights", "ema", "optimizer")
LAYOUTS = ("whole", "sharded")
LEARNT = "learnt"  # group of a value model's state, in a whole file in either layout


def groups_of(parameters: Named, average: Named, optimizer: torch.optim.Optimizer) -> dict[str, Named]:
    """Return all tensors of a run, by group."""
    return dict[str, Named](zip(GROUPS, (parameters, average, optimizer_tensors(parameters, optimizer))))


def optimizer_tensors(parameters: Named, optimizer: torch.optim.Optimizer) -> Named:
    """Return AdamW's state as `<parameter>.<exp_avg | exp_avg_sq | step>`, without weights never stepped."""
    return {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def write(folder: Path, groups: Mapping[str, Named], part: Part | None) -> dict[str, str]:
    """Write the tensors; for a sharded checkpoint, wait for the other ranks' shards. Returns file -> sha256."""
    if part:
        sharded.write(folder, groups, part)
        return sharded.collect(folder, part.writers)
    for group, named in groups.items():
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, _file(folder, group))
    return {path.name: sha256(path) for path in folder.iterdir()}


def write_learnt(folder: Path, learnt: Named) -> dict[str, str]:
    """Write a value model's state, if there is one. Returns file -> sha256."""
    if not learnt:
        return {}
    file = _file(folder, LEARNT)
    save_file(dict(learnt), file)
    return {file.name: sha256(file)}


def read_learnt(folder: Path, state: Mapping[str, Any]) -> Named:
    """Return the value model's state of the checkpoint with this state.json; empty if it has none."""
    return load_file(_file(folder, LEARNT)) if state.get(LEARNT) else {}


def record(groups: Mapping[str, Named], part: Part | None, learnt: Named | None = None) -> dict[str, Any]:
    """Return the entries of state.json that describe the layout."""
    own = {LEARNT: True} if learnt else {}
    if part is None:
        return {"layout": "whole"} | own
    return own | {
        "layout": "sharded",
        "ranks": part.writers.ranks,
        "groups": sum(bool(named) for named in groups.values()),
    }


def tensor_files(state: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensor files that a checkpoint must have. Raises ValueError for an unknown layout."""
    if state["layout"] not in LAYOUTS:
        raise ValueError(f"its layout is {state['layout']!r}, and this version reads {', '.join(LAYOUTS)}")
    learnt = {f"{LEARNT}.safetensors"} if state.get(LEARNT) else set[str]()
    if state["layout"] == "sharded":
        return learnt | sharded.file_names(state["ranks"], state["groups"])
    return learnt | {f"{group}.safetensors" for group in GROUPS}


def read(folder: Path, layout: str, parameters: Named, average: Named, optimizer: torch.optim.Optimizer) -> None:
    """Load parameters, average and optimiser from a checkpoint. Raises UserError if it is of another model."""
    saved = _saved(folder, layout)
    _check_shapes(folder, saved["weights"], parameters)
    _check_shapes(folder, saved["ema"], average)
    _check_moments(folder, saved.get("optimizer", {}), parameters)
    moments = _moments(saved.get("optimizer", {}), parameters)
    _fill(folder, layout, dict[str, Named](zip(GROUPS, (parameters, average, moments))), saved)
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition(".")
        optimizer.state[parameters[name]][key] = value


def read_weights(folder: Path, layout: str, parameters: Named) -> None:
    """Load the trained parameters alone, not averaged. Raises UserError if they are of another model."""
    saved = _saved(folder, layout, ("weights",))
    _check_shapes(folder, saved["weights"], parameters)
    _fill(folder, layout, {"weights": parameters}, saved)


def _saved(folder: Path, layout: str, groups: Sequence[str] = GROUPS) -> Mapping[str, Named]:
    """Return the saved tensors by group; for a sharded checkpoint, on the meta device."""
    return sharded.listed(folder) if layout == "sharded" else {g: load_file(_file(folder, g)) for g in groups}


def _fill(folder: Path, layout: str, groups: Mapping[str, Named], saved: Mapping[str, Named]) -> None:
    if layout == "sharded":
        sharded.read(folder, groups)
        return
    for group, named in groups.items():
        copy_into(named, saved[group])


def _moments(saved: Named, parameters: Named) -> dict[str, Tensor]:
    """Create empty tensors for AdamW's state, sharded like the weights; torch keeps the step count on the CPU."""
    places = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition(".")
        on_cpu = key == "step"
        places[full_name] = torch.zeros_like(value, device="cpu") if on_cpu else torch.zeros_like(parameters[name])
    return places


def _check_shapes(folder: Path, saved: Named, expected: Named) -> None:
    if odd := sorted(saved.keys() ^ expected.keys()):
        raise UserError(f"{folder}: its weights are not those that the run trains, for instance {odd[0]}")
    for name, tensor in expected.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{list(saved[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
            raise UserError(f"{folder}: {name} is {shapes}; it belongs to another model")


def _check_moments(folder: Path, saved: Named, parameters: Named) -> None:
    """Check AdamW's state: two moments of each parameter's shape and a step count. Raises UserError."""
    for full_name, tensor in saved.items():
        name, _, key = full_name.rpartition(".")
        shape = parameters[name].shape if name in parameters else None
        expected = {"exp_avg": shape, "exp_avg_sq": shape, "step": torch.Size()}.get(key)
        if shape is None or expected != tensor.shape or not tensor.is_floating_point():
            said = f"the optimizer's state has {full_name} {list(tensor.shape)}"
            raise UserError(f"{folder}: {said}, which does not fit the trained weights; it belongs to another model")


def _file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"

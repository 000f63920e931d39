"""Checkpoints: everything that the next step depends on, complete or absent, in safetensors and JSON only.

    RUN/checkpoints/step-000050/  weights.safetensors  ema.safetensors  optimizer.safetensors  run.json  state.json

Frozen weights are not copied: the run's model is loaded again. There is no random state to keep, because all
randomness is a function of (seed, step, sample, purpose). state.json holds the sha256 of every other file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leapalign.codec import encode
from leapalign.errors import UserError
from leapalign.run import Run, config_hash, differences, trajectory
from leapalign.training.files import clear_scratch, complete_folder, remove_folder, sha256
from leapalign.training.weights import EMA, Named, copy_into

TENSORS = ("weights", "ema", "optimizer")
PACKAGES = ("leapalign", "torch", "diffusers", "transformers", "safetensors")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # updates done, skipped ones included
    skipped: int = 0  # updates without gradient
    seconds: float = 0.0  # spent in all processes so far


def save(run: Run, progress: Progress, parameters: Named, ema: EMA, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint of `progress.step` and prune older ones; killed at any moment, it is complete or absent."""
    target = _folder(run) / f"step-{progress.step:06d}"
    if not target.exists():  # else a process was killed between this checkpoint and the pruning
        _write(target, run, progress, parameters, ema, optimizer)
    for old in _complete(run)[: -run.keep_checkpoints]:
        remove_folder(old)
    return target


def _write(
    target: Path, run: Run, progress: Progress, parameters: Named, ema: EMA, optimizer: torch.optim.Optimizer
) -> None:
    record = encode(run)
    with complete_folder(target) as folder:
        save_file(_portable(parameters), folder / "weights.safetensors")
        save_file(_portable(ema.shadow), folder / "ema.safetensors")
        save_file(_portable(optimizer_tensors(parameters, optimizer)), folder / "optimizer.safetensors")
        (folder / "run.json").write_text(json.dumps(record, indent=2))
        state: dict[str, Any] = asdict(progress) | {"config": config_hash(record), "versions": _versions()}
        state["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        (folder / "state.json").write_text(json.dumps(state, indent=2))


def restore(run: Run, parameters: Named, ema: EMA, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the newest checkpoint into the given objects; a run that has none yet starts at its first step."""
    _folder(run).mkdir(parents=True, exist_ok=True)
    clear_scratch(_folder(run))
    if not _complete(run):
        return Progress()
    folder = _complete(run)[-1]
    state = _read_state(folder, run)
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in TENSORS}
    _check_names(folder, tensors["weights"], parameters)
    copy_into(parameters, tensors["weights"])
    copy_into(ema.shadow, tensors["ema"])
    _restore_optimizer(parameters, optimizer, tensors["optimizer"])
    return Progress(step=state["step"], skipped=state["skipped"], seconds=state["seconds"])


def optimizer_tensors(parameters: Named, optimizer: torch.optim.Optimizer) -> Named:
    """AdamW's state as `<parameter>.<exp_avg | exp_avg_sq | step>`; nothing for weights that were never stepped."""
    return {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def _restore_optimizer(parameters: Named, optimizer: torch.optim.Optimizer, tensors: Named) -> None:
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        p = parameters[name]
        optimizer.state[p][key] = value if key == "step" else value.to(p.device)  # torch keeps the count on the CPU


def check_unchanged(run: Run) -> None:
    """Refuse to go on with settings other than those of the newest checkpoint, and list them."""
    if not _complete(run):
        return
    _read_state(_complete(run)[-1], run)  # a flipped bit in its run.json would look like a changed setting
    old, new = json.loads((_complete(run)[-1] / "run.json").read_text()), encode(run)
    if config_hash(old) != config_hash(new):
        changes = "\n  ".join(differences(trajectory(old), trajectory(new)))
        raise UserError(
            f"{run.out}: run.json is not what the checkpoint was trained with:\n  {changes}\n"
            "Undo the change to resume, or start a new run with `leapalign train`"
        )


def _read_state(folder: Path, run: Run) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, digest in state["files"].items():
            if sha256(folder / name) != digest:
                raise ValueError(f"{name} has other bytes than were written")
    except (OSError, ValueError, KeyError) as error:
        older = [path.name for path in _complete(run) if path < folder]
        way_out = f"delete that folder to resume from {older[-1]}" if older else "no older one is left: train again"
        raise UserError(f"{folder}: the checkpoint is damaged ({error}); {way_out}") from None
    return state


def _check_names(folder: Path, saved: Named, parameters: Named) -> None:
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise UserError(f"{folder}: it holds other weights than the model trains, for instance {odd[0]}")


def _complete(run: Run) -> list[Path]:
    """Checkpoints, oldest first: a folder has this name only once it is complete."""
    return sorted(_folder(run).glob("step-*"))


def _folder(run: Run) -> Path:
    return Path(run.out) / "checkpoints"


def _portable(tensors: Named) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}

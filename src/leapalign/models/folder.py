"""A diffusers pipeline folder: found, checked before anything is loaded, opened part by part, written whole.

Parts are opened through their own classes (those of diffusers and transformers only, named in model_index.json),
from safetensors only: nothing that a folder contains is executed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.errors import UserError

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = ("diffusers", "transformers")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class PipelineFolder:
    path: Path
    parts: dict[str, tuple[str, str]]  # part -> (library, class); absent parts are left out


_LOADER: ContextVar[Callable[..., Any] | None] = ContextVar("loader", default=None)


@contextmanager
def parts_from(loader: Callable[..., Any]) -> Iterator[None]:
    """Inside, `load_part` asks `loader` with its own arguments: a plan's models have no weights."""
    token = _LOADER.set(loader)
    try:
        yield
    finally:
        _LOADER.reset(token)


def open_folder(path: str, pipeline_class: str, required: tuple[str, ...]) -> PipelineFolder:
    """Find and check the folder of a `pipeline_class` with these parts; reads headers only. Raises UserError."""
    folder = _locate(path)
    index = _read_json(folder / INDEX)
    found = index.get("_class_name") if isinstance(index, dict) else None
    if found != pipeline_class:
        raise UserError(f"{folder} holds a {found}, expected a {pipeline_class}; use the model class of that family")
    parts = {name: (p[0], p[1]) for name, p in index.items() if isinstance(p, list) and len(p) == 2 and p[1]}
    if absent := [name for name in required if name not in parts]:
        raise UserError(f"{folder}: {INDEX} names no {', '.join(absent)}; expected a whole {pipeline_class}")
    for name, (library, _) in parts.items():
        _check_part(folder / name, library)
    return PipelineFolder(folder, parts)


def load_part(folder: PipelineFolder, name: str, dtype: Any = None, quantization: Any = None) -> Any:
    """One part (model, tokenizer or scheduler), frozen and in eval mode if it is a model; None if absent.

    `quantization` is diffusers' configuration of how the weights are quantised while they are read.
    """
    if name not in folder.parts:
        return None
    if loader := _LOADER.get():
        return loader(folder, name, dtype)
    library, class_name = folder.parts[name]
    try:
        kind = getattr(importlib.import_module(library), class_name)
        part, info = _from_pretrained(kind, folder.path / name, library, dtype, quantization)
    except Exception as error:  # whatever a broken file makes the libraries raise is the folder's fault
        raise UserError(f"{folder.path / name} cannot be opened as {class_name}: {error}") from error
    missing = sorted(info.get("missing_keys", ())) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:  # the libraries would fill these with random numbers and go on
        raise UserError(f"{folder.path / name} lacks {len(missing)} weights of {class_name}: {', '.join(missing[:3])}")
    return part


def save_with(folder: PipelineFolder, policy: Any, target: str | Path, policy_part: str = "transformer") -> None:
    """Write the whole pipeline to `target`: the policy's weights, every other part copied. Whole or not at all."""
    target = Path(target)
    _check_target(target, folder.path)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save_pretrained(partial / policy_part, safe_serialization=True)
    for name in folder.parts:
        if name != policy_part:
            _copy(folder.path / name, partial / name)
    for file in (folder.path / INDEX, *folder.path.glob("LICENSE*")):
        shutil.copyfile(file, partial / file.name)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def _locate(path: str) -> Path:
    from leapalign.shapeworld.assets import resolve

    resolved = Path(resolve(path)).expanduser()
    if (resolved / INDEX).is_file():
        return resolved
    if resolved.exists():
        raise UserError(f"{resolved} is not a diffusers pipeline folder: it has no {INDEX}")
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"model folder {resolved} does not exist; give a diffusers pipeline folder or a hub id")
    return _download(path)


def _download(hub_id: str) -> Path:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # offline, gated, missing, interrupted: for the user it is one thing
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id!r} is neither a folder here nor to be had from the hub ({reason}). Give a local pipeline folder, "
            f"or fetch it once while online: `hf download {hub_id}` (a gated model needs its licence accepted on its "
            "page and `hf auth login`)"
        ) from error


def _check_part(part: Path, library: str) -> None:
    if library not in _LIBRARIES:
        raise UserError(f"{part.name} in {part.parent} comes from {library!r}; expected one of {_LIBRARIES}")
    if not part.is_dir():
        raise UserError(f"{part.parent} lacks the folder {part.name}, which its {INDEX} names; copy it completely")
    for file in sorted(part.glob("*.json")):
        _read_json(file)
    for file in sorted(part.glob("*.safetensors.index.json")):
        for shard in sorted(set(_read_json(file)["weight_map"].values())):
            if not (part / shard).is_file():
                raise UserError(f"{part} lacks {shard}, which {file.name} names; copy the folder completely")
    weights = sorted(part.glob("*.safetensors"))
    if not weights and any(file.suffix in _PICKLES for file in part.iterdir()):
        raise UserError(f"{part} has no safetensors, and pickled weights are not opened; convert them")
    for file in weights:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Header readable, and exactly as many bytes behind it as it announces: finds every truncated copy."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({size} bytes); copy it again") from error
    if size != expected:
        raise UserError(f"{file} has {size} bytes, its header announces {expected}; copy it again")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not readable JSON ({error}); copy it again") from error


def _from_pretrained(kind: Any, path: Path, library: str, dtype: Any, quantization: Any) -> tuple[Any, dict[str, Any]]:
    from torch import nn

    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(path, local_files_only=True), {}
    options = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = quantization
    model, info = kind.from_pretrained(  # pyright: ignore
        path, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    return model.eval().requires_grad_(False), info


def _check_target(target: Path, source: Path) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target} is the base model's own folder; save elsewhere")
    if target.exists() and not (target.is_dir() and ((target / INDEX).is_file() or not any(target.iterdir()))):
        raise UserError(f"{target} exists and is no pipeline folder; save elsewhere or remove it")


def _copy(source: Path, target: Path) -> None:
    """Contents only: permissions of a read-only installation and links of the hub cache stay behind."""
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix not in _PICKLES:
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(source))

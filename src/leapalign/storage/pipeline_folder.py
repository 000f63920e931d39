"""A diffusers pipeline, folder or hub id: found, checked before anything is loaded, opened part by part, written whole.

Parts are opened through their own classes (those of diffusers and transformers only, named in model_index.json),
from safetensors only: nothing that a folder contains is executed. The transformer's weights may come from a file of
their own (`single_file`).
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from leapalign.errors import UserError, opening
from leapalign.storage.atomic import complete_folder
from leapalign.storage.files import PICKLES, read_json
from leapalign.storage.hub import is_hub_id, no_such_place, snapshot
from leapalign.storage.safetensors_header import read_header

INDEX = "model_index.json"
TRANSFORMER = "transformer"
_LIBRARIES = ("diffusers", "transformers")
_NOT_OPENED = PICKLES | {".msgpack", ".h5", ".onnx"}
# What a part is made of: its own weights, whole or in shards, and small text files. Not: other precisions
# (model.fp16.safetensors), pickles, and the authors' checkpoints beside the parts.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_WEIGHTS += tuple(f"diffusion_pytorch_{name}" for name in _WEIGHTS)
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the components of a pipeline are loaded: by default from its files, the policy straight to its device."""

    component: Callable[[PipelineFolder, str, Any], Any] | None = None  # (folder, name, dtype): in place of the files
    policy: Literal["device", "cpu", "meta"] = "device"  # where the policy's weights are read to; meta: shapes only


FROM_FILES = Loading()


@dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder, and how its components are loaded."""

    path: Path
    parts: dict[str, tuple[str, str]]  # part -> (library, class); absent parts are left out
    transformer_file: Path | None = None  # where the transformer's weights are, if not in the folder
    loading: Loading = FROM_FILES


def open_folder(
    path: str,
    pipeline_class: str,
    required: tuple[str, ...],
    transformer_file: str = "",
    loading: Loading = FROM_FILES,
) -> PipelineFolder:
    """Find and check the folder of a `pipeline_class` with these parts; reads headers only. Raises UserError."""
    from leapalign.storage.single_file import check_file

    weights = check_file(transformer_file) if transformer_file else None
    folder = locate(path, with_transformer=weights is None)
    index = read_json(folder / INDEX)
    found = index.get("_class_name")
    if found != pipeline_class:
        raise UserError(f"{folder} holds a {found}, expected a {pipeline_class}; use the model class of that family")
    parts = parts_of(index)
    if absent := [name for name in required if name not in parts]:
        raise UserError(f"{folder}: {INDEX} names no {', '.join(absent)}; expected a whole {pipeline_class}")
    for name, (library, _) in parts.items():
        check_part(folder / name, library, with_weights=name != TRANSFORMER or weights is None)
    return PipelineFolder(folder, parts, weights, loading)


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """part -> (library, class), of a model_index.json; parts that are null there are left out."""
    parts = {name: (p[0], p[1]) for name, p in index.items() if isinstance(p, list) and len(p) == 2 and p[1]}
    for name, part in parts.items():
        if not all(isinstance(word, str) for word in part) or Path(name).name != name:
            raise UserError(f'{INDEX}: the part {name!r} is {list(part)!r}; expected a folder, as ["library", "class"]')
    return parts


def load_part(folder: PipelineFolder, name: str, dtype: Any = None, quantization: Any = None) -> Any:
    """One part (model, tokenizer or scheduler), frozen and in eval mode if it is a model; None if absent.

    `quantization` is diffusers' configuration of how the weights are quantised while they are read.
    """
    if name not in folder.parts:
        return None
    if folder.loading.component:
        return folder.loading.component(folder, name, dtype)
    library, class_name = folder.parts[name]
    if name == TRANSFORMER and folder.transformer_file:
        from leapalign.storage.single_file import load_single_file

        if quantization is not None:
            raise UserError(f"{folder.transformer_file}: a single file is not quantised; give the transformer's folder")
        kind = getattr(importlib.import_module(library), class_name)
        model = load_single_file(kind, folder.transformer_file, folder.path / name, dtype)
        return _own_memory(model).eval().requires_grad_(False)
    with opening(f"{folder.path / name} cannot be opened as {class_name}", "copy the folder again, completely"):
        kind = getattr(importlib.import_module(library), class_name)
        part, info = _from_pretrained(kind, folder.path / name, library, dtype, quantization)
    missing = sorted(info.get("missing_keys", ())) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:  # the libraries would fill these with random numbers and go on
        raise UserError(f"{folder.path / name} lacks {len(missing)} weights of {class_name}: {', '.join(missing[:3])}")
    return _own_memory(part) if name == TRANSFORMER and quantization is None else part


def load_policy(folder: PipelineFolder, device: str, dtype: Any, quantization: Any = None) -> Any:
    """The transformer where `folder.loading` puts it; a quantised one always on the device."""
    place = folder.loading.policy
    if place == "device" or quantization is not None:
        return load_part(folder, TRANSFORMER, dtype, quantization).to(device)
    return load_part(folder, TRANSFORMER, dtype) if place == "cpu" else _without_values(folder)


def _without_values(folder: PipelineFolder) -> Any:
    """The transformer of its configuration: parameters on the meta device, everything else made for real."""
    from accelerate import init_empty_weights

    library, class_name = folder.parts[TRANSFORMER]
    kind = getattr(importlib.import_module(library), class_name)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(kind.load_config(folder.path / TRANSFORMER))
    return model.eval().requires_grad_(False)


def _own_memory(model: Any) -> Any:
    """Weights out of the mapped file: how products are rounded on the CPU depends on where in it a tensor begins."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def save_with(folder: PipelineFolder, policy: Any, target: str | Path, policy_part: str = "transformer") -> None:
    """Write the whole pipeline to `target`: the policy's weights, every other part copied. Whole or not at all."""
    target = Path(os.path.abspath(target))  # new/.. is the working folder once new is made, and would be replaced
    _check_target(target, folder.path)
    with complete_folder(target) as partial:
        policy.save_pretrained(partial / policy_part, safe_serialization=True)
        for name in folder.parts:
            if name != policy_part:
                _copy(folder.path / name, partial / name)
        for file in (folder.path / INDEX, *folder.path.glob("LICENSE*")):
            shutil.copyfile(file, partial / file.name)


def locate(path: str, *, with_transformer: bool = True) -> Path:
    """The local folder behind a folder, `embedded:NAME`, or a hub id (fetched, if it is not in the cache)."""
    from leapalign.storage.embedded import resolve

    resolved = Path(resolve(path)).expanduser()
    if (resolved / INDEX).is_file():
        return resolved
    if resolved.is_file():
        raise UserError(
            f"{resolved} is a file; a pipeline needs its folder or hub id as path, and transformer_file={resolved} for "
            "the transformer's weights alone"
        )
    if resolved.exists():
        raise UserError(f"{resolved} is not a diffusers pipeline folder: it has no {INDEX}")
    if not is_hub_id(path):
        raise UserError(
            f"{no_such_place(path)}; give a diffusers pipeline folder, a hub id (org/name or org/name@revision) or "
            "embedded:generator"
        )
    return _fetch(path, with_transformer)


def needed_files(parts: Iterable[str], *, with_transformer: bool = True) -> list[str]:
    """Glob patterns of what a pipeline of these parts needs; `VARIANTS` are to be left out of what they match."""
    patterns = [INDEX, "LICENSE*"]
    for part in parts:
        names = (*_TEXTS, *_WEIGHTS) if part != TRANSFORMER or with_transformer else ("config.json",)
        patterns += [f"{part}/{name}" for name in names]
    return patterns


def _fetch(hub_id: str, with_transformer: bool) -> Path:
    folder = snapshot(hub_id, [INDEX])
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{hub_id} is not a diffusers pipeline: it has no {INDEX}; give the id of a diffusers repository"
        )
    parts = parts_of(read_json(folder / INDEX))
    return snapshot(hub_id, needed_files(parts, with_transformer=with_transformer), VARIANTS)


def check_part(part: Path, library: str, *, with_weights: bool = True) -> None:
    """Whole and readable, as far as it shows without loading. Raises UserError."""
    if library not in _LIBRARIES:
        raise UserError(f"{part.name} in {part.parent} comes from {library!r}; expected one of {_LIBRARIES}")
    if not part.is_dir():
        raise UserError(f"{part.parent} lacks the folder {part.name}, which its {INDEX} names; copy it completely")
    for file in sorted(part.glob("*.json")):
        read_json(file)
    if with_weights:
        _check_weights(part)


def _check_weights(part: Path) -> None:
    for file in sorted(part.glob("*.safetensors.index.json")):
        for shard in shards_of(file):
            if not (part / shard).is_file():
                raise UserError(f"{part} lacks {shard}, which {file.name} names; copy the folder completely")
    weights = sorted(part.glob("*.safetensors"))
    if not weights and any(file.suffix in _NOT_OPENED for file in part.iterdir()):
        raise UserError(f"{part} has no safetensors, and pickled weights are not opened; convert them")
    for file in weights:
        check_safetensors(file)


def shards_of(index: Path) -> list[str]:
    """The files that a *.safetensors.index.json names: beside it, and nowhere else."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise UserError(f"{index} has no weight_map from weights to file names; copy it again")
    if outside := sorted(shard for shard in named.values() if Path(shard).name != shard):
        raise UserError(f"{index} names {outside[0]!r}, which is no file beside it; copy the folder completely")
    return sorted(set(named.values()))


def check_safetensors(file: Path) -> None:
    """Header sound, and exactly as many bytes behind it as it announces: finds every truncated copy."""
    try:
        read_header(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from error
    except ValueError as error:
        raise UserError(f"{file} {error}; copy it again") from error


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
    """Contents only: permissions of a read-only installation and links of the hub cache stay behind.

    So do weights that nothing opens: pickles, and other precisions of the same weights.
    """
    for file in sorted(source.rglob("*")):
        variant = any(fnmatch(file.name, pattern) for pattern in VARIANTS)
        if file.is_file() and file.suffix not in _NOT_OPENED and not variant:
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(source))

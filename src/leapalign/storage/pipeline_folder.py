"""Find a diffusers pipeline (folder or hub id), check it before anything is loaded, and write it completely.

`components.py` loads its components. The transformer's weights may come from a separate file (`single_file.py`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from leapalign.errors import UserError
from leapalign.storage.atomic import complete_folder
from leapalign.storage.files import PICKLES, read_json
from leapalign.storage.hub import is_hub_id, no_such_place, snapshot
from leapalign.storage.safetensors_header import check_safetensors
from leapalign.storage.single_file import check_file, refuse_lora

INDEX = "model_index.json"
TRANSFORMER = "transformer"
_LIBRARIES = ("diffusers", "transformers")
_NOT_OPENED = PICKLES | {".msgpack", ".h5", ".onnx"}
# Files of a component: its weights, in one file or in shards, and small text files. Excluded: other precisions
# (model.fp16.safetensors), pickles, and the authors' checkpoints beside the components.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_WEIGHTS += tuple(f"diffusion_pytorch_{name}" for name in _WEIGHTS)
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the components of a pipeline are loaded: by default from its files, the policy directly to its device."""

    component: Callable[[PipelineFolder, str, Any], Any] | None = None  # (folder, name, dtype) -> component; not files
    policy: Literal["device", "cpu", "meta"] = "device"  # the device that policy weights are read to; meta: shapes only


FROM_FILES = Loading()


@dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder, and how its components are loaded."""

    path: Path
    components: dict[str, tuple[str, str]]  # component -> (library, class); absent components are left out
    transformer_file: Path | None = None  # where the transformer's weights are, if not in the folder
    loading: Loading = FROM_FILES


def open_folder(
    path: str,
    pipeline_class: str,
    required: tuple[str, ...],
    transformer_file: str = "",
    loading: Loading = FROM_FILES,
) -> PipelineFolder:
    """Find and check a `pipeline_class`'s folder with the `required` components, by reading headers only.

    Raises UserError if it is missing, incomplete, damaged, or of another class.
    """
    weights = check_file(transformer_file) if transformer_file else None
    folder = locate(path, with_transformer=weights is None)
    index = read_json(folder / INDEX)
    found = index.get("_class_name")
    if found != pipeline_class:
        raise UserError(f"{folder} holds a {found}, expected a {pipeline_class}; use the model class of that family")
    components = components_of(index)
    if absent := [name for name in required if name not in components]:
        raise UserError(f"{folder}: {INDEX} names no {', '.join(absent)}; expected a whole {pipeline_class}")
    for name, (library, _) in components.items():
        check_component(folder / name, library, with_weights=name != TRANSFORMER or weights is None)
    return PipelineFolder(folder, components, weights, loading)


def quantised_by(folder: PipelineFolder, name: str = TRANSFORMER) -> str:
    """Return the library that quantised a component before it was saved; empty if none did."""
    config = folder.path / name / "config.json"
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    return str(settings.get("quant_method", "an unknown method")) if isinstance(settings, dict) else ""


def components_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> (library, class), from a model_index.json; null components are left out. Raises UserError."""
    components = {name: (p[0], p[1]) for name, p in index.items() if isinstance(p, list) and len(p) == 2 and p[1]}
    for name, component in components.items():
        if not all(isinstance(word, str) for word in component) or Path(name).name != name:
            raise UserError(
                f'{INDEX}: the component {name!r} is {list(component)!r}; expected a folder, as ["library", "class"]'
            )
    return components


def save_with(folder: PipelineFolder, policy: Any, target: str | Path, policy_component: str = "transformer") -> None:
    """Write a complete pipeline to `target`, or nothing: save the policy, copy all other components.

    Raises UserError if `target` is the base's folder, or exists and is neither empty nor a pipeline.
    """
    target = Path(os.path.abspath(target))  # new/.. is the working folder once new is made, and would be replaced
    _check_target(target, folder.path)
    with complete_folder(target) as partial:
        policy.save_pretrained(partial / policy_component, safe_serialization=True)
        for name in folder.components:
            if name != policy_component:
                _copy(folder.path / name, partial / name)
        for file in (folder.path / INDEX, *folder.path.glob("LICENSE*")):
            shutil.copyfile(file, partial / file.name)


def locate(path: str, *, with_transformer: bool = True) -> Path:
    """Return the local folder of a path, `embedded:NAME`, or a hub id (fetched if not in the cache).

    Raises UserError if there is none, or if it is not a diffusers pipeline.
    """
    from leapalign.storage.embedded import resolve

    resolved = Path(resolve(path)).expanduser()
    if (resolved / INDEX).is_file():
        return resolved
    if resolved.is_file():
        if resolved.suffix == ".safetensors":
            check_safetensors(resolved)
            refuse_lora(resolved)
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


def needed_files(components: Iterable[str], *, with_transformer: bool = True) -> list[str]:
    """Return glob patterns of the files that a pipeline with these components needs; also exclude `VARIANTS`."""
    patterns = [INDEX, "LICENSE*"]
    for component in components:
        names = (*_TEXTS, *_WEIGHTS) if component != TRANSFORMER or with_transformer else ("config.json",)
        patterns += [f"{component}/{name}" for name in names]
    return patterns


def _fetch(hub_id: str, with_transformer: bool) -> Path:
    folder = snapshot(hub_id, [INDEX])
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{hub_id} is not a diffusers pipeline: it has no {INDEX}; give the id of a diffusers repository"
        )
    components = components_of(read_json(folder / INDEX))
    return snapshot(hub_id, needed_files(components, with_transformer=with_transformer), VARIANTS)


def check_component(component: Path, library: str, *, with_weights: bool = True) -> None:
    """Check a component without loading its weights. Raises UserError if files are missing or damaged."""
    if library not in _LIBRARIES:
        raise UserError(f"{component.name} in {component.parent} comes from {library!r}; expected one of {_LIBRARIES}")
    if not component.is_dir():
        raise UserError(
            f"{component.parent} lacks the folder {component.name}, which its {INDEX} names; copy it completely"
        )
    for file in sorted(component.glob("*.json")):
        read_json(file)
    if with_weights:
        _check_weights(component)


def _check_weights(component: Path) -> None:
    for file in sorted(component.glob("*.safetensors.index.json")):
        for shard in shards_of(file):
            if not (component / shard).is_file():
                raise UserError(f"{component} lacks {shard}, which {file.name} names; copy the folder completely")
    weights = sorted(component.glob("*.safetensors"))
    if not weights and any(file.suffix in _NOT_OPENED for file in component.iterdir()):
        raise UserError(f"{component} has no safetensors, and pickled weights are not opened; convert them")
    if weights and all(is_variant(file) for file in weights):
        variant = re.split(r"[.-]", weights[0].name.removesuffix(".safetensors").partition(".")[2])[0]
        raise UserError(
            f"{component} holds only the {variant} variant of its weights ({weights[0].name}), which is not opened; "
            f"copy the plain files too, or make them: from_pretrained(FOLDER, variant={variant!r}) and "
            "save_pretrained(ANOTHER) of its class in diffusers or transformers"
        )
    for file in weights:
        check_safetensors(file)


def is_variant(file: Path) -> bool:
    """Return whether a file of weights is another precision or kind beside the plain one, by its name."""
    return any(fnmatch(file.name, pattern) for pattern in VARIANTS)


def shards_of(index: Path) -> list[str]:
    """List the shards that a *.safetensors.index.json names. Raises UserError if one is not in the index's folder."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise UserError(f"{index} has no weight_map from weights to file names; copy it again")
    if outside := sorted(shard for shard in named.values() if Path(shard).name != shard):
        raise UserError(f"{index} names {outside[0]!r}, which is not a file beside it; copy the folder completely")
    return sorted(set(named.values()))


def _check_target(target: Path, source: Path) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target} is the base model's own folder; save elsewhere")
    if target.exists() and not (target.is_dir() and ((target / INDEX).is_file() or not any(target.iterdir()))):
        raise UserError(f"{target} exists and is not a pipeline folder; save elsewhere or remove it")


def _copy(source: Path, target: Path) -> None:
    """Copy the files' contents, without a read-only installation's permissions or the hub cache's links.

    Skips weights that are never opened: pickles, and other precisions of the same weights.
    """
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix not in _NOT_OPENED and not is_variant(file):
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(source))

"""Models without weights: shapes, dtypes and a graph, and no memory.

Parts are built on the meta device, from their configurations alone: nothing that a file of weights holds is read.
Before something is computed with them their tensors become torch's fake ones, which are meta tensors that claim to lie
on the CPU, so that autocast and attention take the ways that they take there.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.errors import UserError, opening
from leapalign.models.published import PIPELINES, Pipeline
from leapalign.storage.pipeline_folder import INDEX, Loading, PipelineFolder

META = "meta"


def fake_mode() -> FakeTensorMode:
    """Inside, new tensors have no memory; outside, what is computed with such tensors has none either."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def load_weightless(model: Any, dtype: str, tuning: Any, build: Callable[..., Any]) -> Any:
    """The model of a configuration, by its own `load`, on the meta device; `build` makes its parts, as `build_part`."""
    return model.load(META, dtype, tuning, Loading(component=build))


def fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of the module's own, each for each (tied weights stay tied)."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made.setdefault(id(tensor), twin(tensor, mode))
                    table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
        tables = {name: twin(value, mode) for name, value in vars(part).items() if isinstance(value, torch.Tensor)}
        vars(part).update(tables)  # what is neither weight nor buffer, as Qwen-Image's rotary tables


def twin(value: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor for a tensor; another value is its own."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        empty = torch.empty(value.shape, dtype=value.dtype)
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def build_part(folder: PipelineFolder, name: str, dtype: torch.dtype | None = None) -> Any:
    """One part from its configuration: a model without memory, frozen; a scheduler as it is; None if absent."""
    if name not in folder.parts:
        return None
    library, class_name = folder.parts[name]
    with opening(f"{folder.path / name}: its configuration makes no {class_name}", "copy the folder again, completely"):
        kind = getattr(importlib.import_module(library), class_name)
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(folder.path / name, local_files_only=True)
        with torch.device(META):
            model = _from_config(kind, library, folder.path / name)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of nothing


def _from_config(kind: Any, library: str, path: Path) -> Any:
    if library == "diffusers":
        return kind.from_config(kind.load_config(path))
    return kind(kind.config_class.from_pretrained(path))


@contextmanager
def folder_of(path: str) -> Iterator[tuple[Path, Pipeline | None]]:
    """The folder of a model's path, and what is known of it: its own, or one made of the numbers that ship.

    Nothing is downloaded. Raises UserError for a hub id that is neither known nor in the hub's cache.
    """
    from leapalign.storage.embedded import resolve

    here = Path(resolve(path)).expanduser()
    if here.exists() or path not in PIPELINES:
        yield (here if here.exists() else _cached(path)), None
        return
    with tempfile.TemporaryDirectory(prefix="leapalign-plan-") as scratch:
        write_configs(PIPELINES[path], Path(scratch))
        yield Path(scratch), PIPELINES[path]


def _cached(path: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, INDEX)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UserError(
            f"{path!r} is no folder here, is not in the hub's cache, and its numbers do not ship with leapalign; there "
            f"are {', '.join(PIPELINES)}. Give a local pipeline folder, or fetch it first: `hf download {path}`"
        )
    return Path(found).parent


def write_configs(pipeline: Pipeline, folder: Path) -> None:
    """A pipeline folder with configurations and without weights."""
    index: dict[str, Any] = {"_class_name": pipeline.kind, **pipeline.index}
    for name, (kind, config) in pipeline.parts.items():
        index[name] = kind.split(".")
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        if config:
            (folder / name / file).write_text(json.dumps({"_class_name": kind.split(".")[1], **config}))
    (folder / INDEX).write_text(json.dumps(index))

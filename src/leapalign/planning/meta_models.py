"""Meta-device models: shapes, dtypes and autograd graphs without memory for weights.

Components are built on the meta device from their configurations; no weight file is read. Before a forward, their
tensors are replaced by torch's fake tensors: meta tensors that report the CPU as their device, so that autocast and
attention choose the code that they choose on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.errors import opening
from leapalign.storage.components import component_class
from leapalign.storage.pipeline_folder import Loading, PipelineFolder

META = "meta"


def fake_mode() -> FakeTensorMode:
    """Return a mode under which new tensors are fake; operators on fake tensors return fake tensors outside it too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def load_weightless(model: Any, dtype: str, tuning: Any, build: Callable[..., Any]) -> Any:
    """Load a model configuration on the meta device; `build` makes its components, as `build_component` does."""
    return model.load(META, dtype, tuning, Loading(component=build))


def fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors by fake tensors, one for each tensor (tied weights stay tied)."""
    made: dict[int, torch.Tensor] = {}
    for submodule in module.modules():
        for table in (submodule._parameters, submodule._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made.setdefault(id(tensor), twin(tensor, mode))
                    table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
        tables = {name: twin(value, mode) for name, value in vars(submodule).items() if isinstance(value, torch.Tensor)}
        vars(submodule).update(tables)  # tensors in plain attributes, such as Qwen-Image's rotary tables


def twin(value: Any, mode: FakeTensorMode) -> Any:
    """Return a fake tensor of the same shape and dtype for a tensor; return any other value unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        empty = torch.empty(value.shape, dtype=value.dtype)
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def build_component(folder: PipelineFolder, name: str, dtype: torch.dtype | None = None) -> Any:
    """Build a component from its configuration: a frozen meta-device model, or a scheduler; None if absent."""
    if name not in folder.components:
        return None
    library, class_name = folder.components[name]
    with opening(f"{folder.path / name}: its configuration makes no {class_name}", "copy the folder again, completely"):
        kind = component_class(library, class_name)
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(folder.path / name, local_files_only=True)
        with torch.device(META):
            model = _from_config(kind, library, folder.path / name)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns without a cause


def _from_config(kind: Any, library: str, path: Path) -> Any:
    if library == "diffusers":
        return kind.from_config(kind.load_config(path))
    return kind(kind.config_class.from_pretrained(path))

"""Load the components of a checked pipeline folder: models, tokenizers and schedulers.

Each is loaded by the class that model_index.json names (from diffusers or transformers), from safetensors only: no
code in a folder is executed.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from leapalign.errors import UserError, opening
from leapalign.storage.pipeline_folder import TRANSFORMER, PipelineFolder, quantised_by
from leapalign.storage.single_file import load_single_file


def load_component(folder: PipelineFolder, name: str, dtype: Any = None, quantization: Any = None) -> Any:
    """Load a component: a model (frozen, in eval mode), tokenizer or scheduler; None if absent.

    `quantization`: diffusers' configuration for quantising the weights while they are read. Raises UserError if files
    cannot be opened or lack weights.
    """
    if name not in folder.components:
        return None
    if folder.loading.component:
        return folder.loading.component(folder, name, dtype)
    library, class_name = folder.components[name]
    if name == TRANSFORMER and folder.transformer_file:
        if quantization is not None:
            raise UserError(f"{folder.transformer_file}: a single file is not quantised; give the transformer's folder")
        kind = component_class(library, class_name)
        model = load_single_file(kind, folder.transformer_file, folder.path / name, dtype)
        return _own_memory(model).eval().requires_grad_(False)
    with opening(f"{folder.path / name} cannot be opened as {class_name}", _remedy(folder, name)):
        kind = component_class(library, class_name)
        component, info = _from_pretrained(kind, folder.path / name, library, dtype, quantization)
    if quantised_by(folder, name) == "bitsandbytes":  # its 8-bit layers say in every forward that they use float16
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
    missing = sorted(info.get("missing_keys", ())) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:  # the libraries would initialise these at random and continue
        raise UserError(f"{folder.path / name} lacks {len(missing)} weights of {class_name}: {', '.join(missing[:3])}")
    return _own_memory(component) if name == TRANSFORMER and quantization is None else component


class _Once(logging.Filter):
    """Let the first record of each message through."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self._seen
        self._seen.add(record.msg)
        return new


_ONCE = _Once()


def component_class(library: str, class_name: str) -> Any:
    """Import a component's class from diffusers or transformers. Raises AttributeError if the library has no such."""
    return getattr(importlib.import_module(library), class_name)


def load_policy(folder: PipelineFolder, device: str, dtype: Any, quantization: Any = None) -> Any:
    """Load the transformer to where `folder.loading` says; a quantised one always to `device`."""
    place = folder.loading.policy
    if place == "device" or quantization is not None or quantised_by(folder):
        return load_component(folder, TRANSFORMER, dtype, quantization).to(device)
    return load_component(folder, TRANSFORMER, dtype) if place == "cpu" else _without_values(folder)


def _remedy(folder: PipelineFolder, name: str) -> str:
    method = quantised_by(folder, name)
    if not method:
        return "copy the folder again, completely"
    needs = "bitsandbytes (pip install 'leapalign[quantization]') and a GPU" if method == "bitsandbytes" else method
    return f"its weights are quantised by {method}, which needs {needs}; install that, or give the unquantised model"


def _without_values(folder: PipelineFolder) -> Any:
    """Build the transformer from its configuration, with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights

    library, class_name = folder.components[TRANSFORMER]
    kind = component_class(library, class_name)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(kind.load_config(folder.path / TRANSFORMER))
    return model.eval().requires_grad_(False)


def _own_memory(model: Any) -> Any:
    """Copy weights out of the memory-mapped file: on the CPU their alignment in it would change how products round."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


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

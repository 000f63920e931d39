"""Load a transformer from one safetensors file, with diffusers' key names or those of its authors' repository.

config.json of the pipeline's folder defines the architecture. diffusers' converters apply the key map; this file adds a
check that no tensor is missing (it would stay on the meta device) or left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from leapalign.errors import UserError
from leapalign.storage.safetensors_header import check_safetensors, read_header

LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")
# Prefixes of other components in checkpoints of a whole pipeline; these components are loaded from the folder instead.
OTHER_COMPONENTS = ("first_stage_model.", "text_encoders.", "vae.", "conditioner.", "cond_stage_model.")


@runtime_checkable
class OpensSingleFile(Protocol):
    """A class of diffusers that reads files with the key names of the model's authors."""

    def from_single_file(self, *arguments: Any, **settings: Any) -> Any: ...


def check_file(path: str) -> Path:
    """Check a transformer file before anything is loaded, and return its path.

    Raises UserError if it is missing, not safetensors, truncated, or a LoRA.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"transformer_file {file}: file not found; give a .safetensors file, or leave it empty")
    if file.suffix != ".safetensors":
        raise UserError(f"transformer_file {file}: only .safetensors is opened, pickled weights are not; convert it")
    check_safetensors(file)
    refuse_lora(file)
    return file


def refuse_lora(file: Path) -> None:
    """Raise UserError if a safetensors file holds an adapter, in diffusers', PEFT's or kohya's layout."""
    keys = read_header(file).keys() - {"__metadata__"}
    if keys and all(key.endswith(".alpha") or any(mark in key for mark in LORA_MARKS) for key in keys):
        raise UserError(
            f"{file} is a LoRA, which holds no weights of a model; merge it into its base first (diffusers' "
            "load_lora_weights, fuse_lora and save_pretrained) and give that folder, or let a run that trains a LoRA "
            f"begin with it: --tuning.start {file}"
        )


def load_single_file(kind: Any, file: Path, config_folder: Path, dtype: Any) -> Any:
    """Load a `kind` with that folder's configuration and the file's weights. Raises UserError unless all keys match."""
    from safetensors.torch import load_file
    from torch import nn

    name = kind.__name__
    if not isinstance(kind, OpensSingleFile):
        raise UserError(f"transformer_file: diffusers cannot open a single file as {name}; leave it empty")
    weights = {key: weight for key, weight in load_file(file).items() if not key.startswith(OTHER_COMPONENTS)}
    try:
        # the converters remove used entries from `weights`; the model has no place for those that remain
        model = kind.from_single_file(weights, config=str(config_folder), local_files_only=True)  # in float32
    except Exception as error:  # the converters raise KeyError, IndexError, ValueError or RuntimeError
        raise UserError(
            f"transformer_file {file} cannot be opened as {name} ({_reason(error)}) with the sizes that "
            f"{config_folder / 'config.json'} says; expected the weights of this very architecture, in diffusers' or "
            "in the original key names"
        ) from error
    if unused := sorted(weights.keys() - model.state_dict().keys()):
        raise UserError(
            f"transformer_file {file} holds {len(unused)} weights for which {name} has no place, e.g. {unused[0]}; "
            "expected a file of this very architecture that is not quantised"
        )
    return nn.Module.to(model, dtype)  # diffusers' own `to` warns without a cause


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, NotImplementedError):  # torch's error for weights left on the meta device
        return "weights are missing"
    return str(error) or type(error).__name__

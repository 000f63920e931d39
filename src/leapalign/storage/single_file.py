"""A transformer from one safetensors file, in diffusers' key names or in those of its authors' own repository.

The file says nothing about the architecture: config.json of the pipeline's folder does. diffusers' converters do the
renaming; here is only what they leave out: no tensor may be missing (it would stay without memory) or be left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leapalign.errors import UserError
from leapalign.storage.safetensors_header import check_safetensors, read_header

LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")
# Components that checkpoints of a whole pipeline carry besides the transformer; they come from the folder.
OTHER_COMPONENTS = ("first_stage_model.", "text_encoders.", "vae.", "conditioner.", "cond_stage_model.")


def check_file(path: str) -> Path:
    """Before anything is loaded: there, safetensors, and as long as its header says."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"transformer_file {file}: there is no such file; give a .safetensors file, or leave it empty")
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
            "load_lora_weights, fuse_lora and save_pretrained) and give that folder"
        )


def load_single_file(kind: Any, file: Path, config_folder: Path, dtype: Any) -> Any:
    """A `kind` of that folder's configuration with the file's weights. Raises UserError unless they fill it exactly."""
    from safetensors.torch import load_file
    from torch import nn

    name = kind.__name__
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"transformer_file: diffusers opens no single file as {name}; leave it empty, give a folder")
    weights = {key: weight for key, weight in load_file(file).items() if not key.startswith(OTHER_COMPONENTS)}
    try:
        # the converters take out of `weights` what they use; what stays there has no place in the model
        model = kind.from_single_file(weights, config=str(config_folder), local_files_only=True)  # in float32
    except Exception as error:  # KeyError, IndexError, ValueError, RuntimeError: whichever line of the converter it is
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
    return nn.Module.to(model, dtype)  # not diffusers' own, which warns without a cause


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, NotImplementedError):  # torch's word for weights without memory: nothing was there for them
        return "weights are missing"
    return str(error) or type(error).__name__

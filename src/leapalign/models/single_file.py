"""A transformer from one safetensors file, in diffusers' key names or in those of its authors' own repository.

The file says nothing about the architecture: config.json of the pipeline's folder does. diffusers' converters do the
renaming; here is only what they leave out: no tensor may be missing (it would stay without memory) or be left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leapalign.errors import UserError

# Parts that checkpoints of a whole pipeline carry besides the transformer; they come from the folder.
OTHER_PARTS = ("first_stage_model.", "text_encoders.", "vae.", "conditioner.", "cond_stage_model.")


def check_file(path: str) -> Path:
    """Before anything is loaded: there, safetensors, and as long as its header says."""
    from leapalign.models.folder import check_safetensors

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"transformer_file {file}: there is no such file; give a .safetensors file, or leave it empty")
    if file.suffix != ".safetensors":
        raise UserError(f"transformer_file {file}: only .safetensors is opened, pickled weights are not; convert it")
    check_safetensors(file)
    return file


def load_single_file(kind: Any, file: Path, config_folder: Path, dtype: Any) -> Any:
    """A `kind` of that folder's configuration with the file's weights. Raises UserError unless they fill it exactly."""
    from safetensors.torch import load_file

    name = kind.__name__
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"transformer_file: diffusers opens no single file as {name}; leave it empty, give a folder")
    weights = {key: weight for key, weight in load_file(file).items() if not key.startswith(OTHER_PARTS)}
    try:
        # the converters take out of `weights` what they use; what stays there has no place in the model
        model = kind.from_single_file(weights, config=str(config_folder), local_files_only=True, torch_dtype=dtype)
    except Exception as error:  # KeyError, IndexError, ValueError, RuntimeError: whichever line of the converter it is
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(
            f"transformer_file {file} cannot be opened as {name} with {config_folder / 'config.json'} ({reason}); "
            "expected the weights of this very architecture, in diffusers' or in the original key names"
        ) from error
    state = model.state_dict()
    _refuse(file, name, "lacks", sorted(key for key, weight in state.items() if weight.is_meta))
    _refuse(file, name, "has no place for", sorted(weights.keys() - state.keys()))
    return model


def _refuse(file: Path, name: str, what: str, keys: list[str]) -> None:
    if keys:
        raise UserError(
            f"transformer_file {file} does not fill the {name}: it {what} {len(keys)} weights, e.g. {keys[0]}; "
            "expected a full-precision file of this very architecture"
        )

"""LoRA files: one safetensors file in diffusers' layout, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leapalign.errors import UserError

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights expects in a folder
PREFIX = "transformer."


def write_lora(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the state of `adapter_state`, with the metadata from which diffusers builds the adapter without guessing.

    In the metadata alpha is the rank, because B contains the scale.
    """
    rank = {value.shape[0] for name, value in state.items() if name.endswith(".lora_A.weight")}.pop()
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    config = {"r": rank, "lora_alpha": rank, "target_modules": layers, "rank_pattern": {}}  # diffusers 0.39 reads it
    # one entry only: safetensors writes entries in any order, and equal adapters should give equal files
    metadata = {"lora_adapter_metadata": json.dumps({PREFIX + k: v for k, v in config.items()})}
    save_file({PREFIX + name: value for name, value in state.items()}, folder / FILE, metadata=metadata)


def read_lora(folder: Path) -> dict[str, Tensor]:
    """Read the state that `write_lora` wrote. Raises UserError if the file is unreadable or has other names."""
    try:
        tensors = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / FILE}: cannot read the adapter ({error})") from None
    if odd := [name for name in tensors if not name.startswith(PREFIX)]:
        raise UserError(f"{folder / FILE}: {odd[0]} does not begin with {PREFIX!r}; this is not an adapter of a run")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}

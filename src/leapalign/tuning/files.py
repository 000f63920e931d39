"""LoRA files: one safetensors file in diffusers' layout, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leapalign.errors import UserError

FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for in a folder
PREFIX = "transformer."


def write_lora(folder: Path, state: dict[str, Tensor]) -> None:
    """`state` as `adapter_state` has it. The metadata says what diffusers needs to build the adapter without guessing.

    alpha is the rank, because the scale is in B.
    """
    rank = {value.shape[0] for name, value in state.items() if name.endswith(".lora_A.weight")}.pop()
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    config = {"r": rank, "lora_alpha": rank, "target_modules": layers, "rank_pattern": {}}  # diffusers 0.39 reads it
    # one entry: safetensors writes several in any order, and equal adapters should be equal files
    metadata = {"lora_adapter_metadata": json.dumps({PREFIX + k: v for k, v in config.items()})}
    save_file({PREFIX + name: value for name, value in state.items()}, folder / FILE, metadata=metadata)


def read_lora(folder: Path) -> dict[str, Tensor]:
    """The state that `write_lora` was given."""
    try:
        tensors = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / FILE}: cannot read the adapter ({error})") from None
    if odd := [name for name in tensors if not name.startswith(PREFIX)]:
        raise UserError(f"{folder / FILE}: {odd[0]} does not begin with {PREFIX!r}; this is no adapter of a run")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}

"""A frozen base in 8 or 4 bits, through diffusers' own quantisation of a part while it is opened.

int8 is torchao's (weights only, one scale a row), which works on CPU and GPU; nf4 is bitsandbytes' (QLoRA's 4 bits,
arXiv 2305.14314), for which diffusers wants a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from leapalign.errors import UserError

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantization_config(kind: str) -> Any:
    """diffusers' configuration; None for "none". UserError names the package that is missing."""
    if kind == "none":
        return None
    package = PACKAGES[kind]
    remedy = f"pip install 'leapalign[quantization]', or {package} alone"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"quantization {kind} needs the package {package}: {remedy}")
    try:
        return _int8() if kind == "int8" else _nf4()
    except ImportError as error:  # a version that lacks what is asked of it
        raise UserError(f"quantization {kind}: this {package} cannot be used ({error}); {remedy}, upgraded") from error


def compute_in(policy: Any, dtype: Any) -> None:
    """Cast what goes into each quantised layer: autocast does not see these layers, and float32 would go through.

    Activations would take twice the memory, and FLUX, which takes its time's precision from them, other values.
    """
    from torch import nn

    for module in policy.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def _int8() -> Any:
    from diffusers.quantizers.quantization_config import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return TorchAoConfig(Int8WeightOnlyConfig())


def _nf4() -> Any:
    import torch
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig

    _refuse_without_gpu()
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _refuse_without_gpu() -> None:
    """As diffusers does, and with reason: on a CPU, layers whose input is no multiple of 64 features come out wrong.

    (bitsandbytes 0.50.2: dequantising begins a new block in each row, quantising does not.)
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("quantization nf4 needs a GPU; on the CPU use int8 or none")

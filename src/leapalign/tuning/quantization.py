"""Quantise a frozen base to 8 or 4 bits, through diffusers' own quantisation of a component while it is loaded.

int8 is torchao's (weights only, one scale per row) and runs on CPU and GPU; nf4 is bitsandbytes' (QLoRA's 4 bits,
arXiv 2305.14314), for which diffusers requires a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol, runtime_checkable

from leapalign.errors import UserError
from leapalign.storage.pipeline_folder import TRANSFORMER, PipelineFolder, quantised_by
from leapalign.tuning.base import QuantisesBase

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


@runtime_checkable
class Quantised(Protocol):
    """A model that diffusers quantised while loading it, or loaded from a quantised folder: it holds its quantiser."""

    @property
    def hf_quantizer(self) -> Any: ...


def quantization_config(kind: str) -> Any:
    """Return diffusers' configuration; None for "none". Raises UserError if a package is missing or too old."""
    if kind == "none":
        return None
    package = PACKAGES[kind]
    remedy = f"pip install 'leapalign[quantization]', or {package} alone"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"quantization {kind} needs the package {package}: {remedy}")
    try:
        return _int8() if kind == "int8" else _nf4()
    except ImportError as error:  # the installed version is too old
        raise UserError(f"quantization {kind}: this {package} cannot be used ({error}); {remedy}, upgraded") from error


def refuse_twice(folder: PipelineFolder, kind: str) -> None:
    """Raise UserError if the run would quantise a transformer whose folder is quantised already."""
    method = quantised_by(folder)
    if method and kind != "none":
        raise UserError(
            f"{folder.path / TRANSFORMER} is quantised already (by {method}), so quantization {kind} would not be "
            "applied; leave --tuning.quantization at none, or give the unquantised model"
        )


def base_note(policy: object, tuning: object) -> str:
    """Return what the user should know at the start about a base that was quantised before the run; else empty."""
    if not isinstance(policy, Quantised) or (isinstance(tuning, QuantisesBase) and tuning.quantization != "none"):
        return ""
    return (
        f"the base is quantised already (by {policy.hf_quantizer.quantization_config.quant_method.value}): the adapter "
        "is trained beside its rounded weights and cannot be merged into them (export --format lora)"
    )


def compute_in(policy: Any, dtype: Any) -> None:
    """Cast the inputs of each quantised layer to `dtype`: autocast ignores these layers, and float32 would remain.

    float32 activations would double their memory and change FLUX's results, whose timestep takes their dtype.
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
    """Raise UserError without a GPU, like diffusers: on a CPU, layers with inputs not a multiple of 64 are wrong.

    In bitsandbytes 0.50.2 dequantising starts a new block in each row; quantising does not.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("quantization nf4 needs a GPU; on the CPU use int8 or none")

"""LoRA runs of the paper's task and method on one GPU of 48 GB or 24 GB.

Departures: the paper trains all weights on 16 GPUs. Our choices, not measured on published weights: rank 32 and scale
1, learning rate 1e-4 (adapters start at zero and need a larger step than 1e-5), the reward in bfloat16. Memory of a
run: `leapalign train NAME --dry-run`; decoding one image with gradient takes most memory after the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from leapalign.recipes.paper import PREFERENCE, flux, leapalign
from leapalign.run import Run
from leapalign.tuning.lora import LoRA


def flux_lora_48gb() -> Run:
    """LeapAlign with LoRA on FLUX.1-dev for one 48 GB card: 720 x 720, base in bfloat16."""
    return _lora("flux-lora-48gb", 720, "none")


def flux_lora_24gb() -> Run:
    """LeapAlign with LoRA on FLUX.1-dev for one 24 GB card: 512 x 512, base in 4 bits (nf4)."""
    return _lora("flux-lora-24gb", 512, "nf4")


def _lora(name: str, pixels: int, quantization: Literal["none", "int8", "nf4"]) -> Run:
    run = flux(leapalign(PREFERENCE), PREFERENCE)
    return replace(
        run,
        name=name,
        out=f"runs/{name}",
        model=replace(run.model, height=pixels, width=pixels, decode_chunk=1),
        tuning=LoRA(rank=32, quantization=quantization),
        rewards=tuple(replace(term, dtype="bfloat16") for term in run.rewards),
        learning_rate=1e-4,
    )


SMALL_GPU: dict[str, Callable[[], Run]] = {"flux-lora-48gb": flux_lora_48gb, "flux-lora-24gb": flux_lora_24gb}

"""Randomness as a pure function of (seed, step, sample, purpose), so that a run resumes bit for bit.

Nothing here depends on the micro-batch, the device or the rank: two runs of another geometry see the same noise.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *, step: int, sample: int, purpose: str) -> int:
    """63 bits of sha256 over the four names; neighbouring steps and samples share nothing."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *, step: int, sample: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose of one sample of one step. On the CPU its values are the same everywhere."""
    import torch

    return torch.Generator(device).manual_seed(derived_seed(seed, step=step, sample=sample, purpose=purpose))

"""Randomness as a pure function of (seed, step, sample, purpose), so that a run resumes bit for bit.

Nothing here depends on the micro-batch, the device or the rank: two runs of another geometry see the same noise.

torch's CPU generator (Mersenne twister, mt19937) uses only 32 bits of the seed that `manual_seed` is given: two of the
19,200 noises of a run of 300 updates of 64 would be equal with a probability of 4 %. So its whole state, 624 words of
32 bits, comes from SHAKE-256 of the four names.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORDS = 624  # of mt19937's state
SCHEME = 2  # how (seed, step, sample, purpose) become numbers; 1 seeded torch's generator with 32 bits


def derived_seed(seed: int, *, step: int, sample: int, purpose: str) -> int:
    """63 bits of sha256 over the four names; neighbouring steps and samples share nothing."""
    digest = hashlib.sha256(_name(seed, step, sample, purpose)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *, step: int, sample: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose of one sample of one step. On the CPU its values are the same everywhere."""
    import torch

    made = torch.Generator(device).manual_seed(derived_seed(seed, step=step, sample=sample, purpose=purpose))
    if made.device.type == "cpu":  # others (Philox on CUDA) use all 63 bits
        digest = hashlib.shake_256(_name(seed, step, sample, purpose)).digest(4 * WORDS)
        _set_words(made, struct.unpack(f"<{WORDS}I", digest))
    return made


def _name(seed: int, step: int, sample: int, purpose: str) -> bytes:
    return f"{seed}/{step}/{sample}/{purpose}".encode()


def _set_words(generator: torch.Generator, words: tuple[int, ...]) -> None:
    """Replace mt19937's state in torch's record of it: seed, counters (3 words of 64 bits), the state, cached normals.

    A generator that was just seeded has used none of its state, so the first number comes from the new one.
    """
    import torch

    record = generator.get_state()
    state = record.numpy()[24 : 24 + 8 * WORDS].view("uint64")  # a word takes 64 bits here; shares the record's memory
    if record.numel() != 5056 or (state >> 32).any():
        raise RuntimeError(f"torch {torch.__version__} records its CPU generator in another form; report this")
    state[:] = words
    generator.set_state(record)

"""Generators: the full state of mt19937 from the four names, checked against numpy's own; no collisions of 32 bits."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from leapalign.seeds import generator


def drawn(seed: int, step: int, sample: int, purpose: str = "noise") -> torch.Tensor:
    return torch.randn(16, generator=generator(seed, step=step, sample=sample, purpose=purpose))


def test_numbers_are_those_of_a_mersenne_twister_with_this_state():
    """numpy's MT19937 begun at the same 624 words gives the same numbers, over more than one round of the state."""
    words = np.frombuffer(hashlib.shake_256(b"5/7/11/noise").digest(4 * 624), dtype="<u4")
    reference = np.random.MT19937()
    reference.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    given = torch.rand(2000, generator=generator(5, step=7, sample=11, purpose="noise"))  # 24 bits of each number
    assert given.tolist() == [int(n) % 2**24 / 2**24 for n in reference.random_raw(2000)]


def test_values_are_the_same_everywhere():
    first = torch.rand(3, generator=generator(0, step=0, sample=0, purpose="noise"))
    assert first.tolist() == [0.28204864263534546, 0.3461839556694031, 0.37182724475860596]


def test_noises_that_shared_32_bits_of_their_seed_differ():
    """Under torch's manual_seed these two of seed 8 were equal."""
    assert not torch.equal(drawn(8, 278, 48), drawn(8, 85, 13))


def test_names_decide_and_nothing_else():
    again = drawn(1, 2, 3)
    torch.manual_seed(99)
    assert torch.equal(drawn(1, 2, 3), again)
    others = [drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 2), drawn(1, 2, 3, "draw")]
    assert not any(torch.equal(other, again) for other in others)
    assert generator(1, step=2, sample=3, purpose="noise").initial_seed() > 2**32


def test_noise_is_standard_normal():
    """Over many generators, entry by entry: a generator's first numbers are as good as its later ones."""
    rows = torch.stack([drawn(0, step, 0) for step in range(4000)])
    assert rows.mean(0).abs().max() < 5 / 4000**0.5
    assert (rows.std(0) - 1).abs().max() < 5 / (2 * 4000) ** 0.5
    correlation = torch.corrcoef(rows.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4000**0.5

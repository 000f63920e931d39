"""What holds for every test: nothing is fetched, one thread, the same random numbers in each run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers or diffusers, which read it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LEAPALIGN_CACHE"] = str(
    Path(tempfile.gettempdir(), f"leapalign-tests-{os.getpid()}")
)  # never the user's own

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-every-time")
torch.set_num_threads(1)  # the models are tiny: more threads wait more than they compute


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which tests ran before it."""
    torch.manual_seed(0)

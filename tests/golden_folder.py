"""Where the expected outputs of published code lie: $LEAPALIGN_GOLDEN, or ../shared/golden beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(os.environ.get("LEAPALIGN_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def golden(name: str) -> Path:
    """The folder of one set; skips the test where it is absent."""
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"no expected outputs at {folder}; set LEAPALIGN_GOLDEN")
    return folder


def tokenizer(name: str) -> str:
    """A published tokenizer in `$LEAPALIGN_TOKENIZERS`/NAME, as its save_pretrained writes it; skips where absent."""
    folder = Path(os.environ.get("LEAPALIGN_TOKENIZERS", GOLDEN.parent / "tokenizers")) / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}; set LEAPALIGN_TOKENIZERS")
    return str(folder)

"""The header of a safetensors file, without its weights: what is in it, and whether the file is as long as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leapalign.errors import UserError

Header = dict[str, dict[str, Any]]  # tensor -> {"dtype", "shape", "data_offsets"}; "__metadata__" -> texts


def read_header(file: Path) -> Header:
    """Raises ValueError, with the reason, unless the header is sound and exactly as many bytes as it announces follow.

    Sound is what safetensors itself opens: known number types, shapes that fill their bytes, nothing twice or between.
    """
    if file.is_dir():
        raise ValueError("is a folder, not a file")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is not a readable safetensors file ({size} bytes)") from error
    if size != expected:
        raise ValueError(f"has {size} bytes, its header announces {expected}")
    _check_sound(file)
    return header


def check_safetensors(file: Path) -> None:
    """Header sound, and exactly as many bytes behind it as it announces: finds every truncated copy."""
    try:
        read_header(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from error
    except ValueError as error:
        raise UserError(f"{file} {error}; copy it again") from error


def _check_sound(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"is not a sound safetensors file ({error})") from error

"""Read a safetensors file's header without its weights, and check the file's length against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leapalign.errors import UserError

Header = dict[str, dict[str, Any]]  # tensor -> {"dtype", "shape", "data_offsets"}; "__metadata__" -> texts


def read_header(file: Path) -> Header:
    """Read and check the header. Raises ValueError if it is invalid or the file's length differs from the header's.

    Valid means that safetensors opens it: known dtypes, shapes that fill their bytes, no overlaps or gaps.
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
    """Raise UserError for an invalid header or a length that differs from the header's, as in a truncated copy."""
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

"""Hash a file, read a JSON object; suffixes of pickles, which pipelines never open and rewards only as tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from leapalign.errors import UserError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})  # unpickling executes code in the file


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a model's folder. Raises UserError if it is missing or not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected an object with settings; copy it again")
    return content

"""Hash the content of weights and other files, independent of their names, places and times.

Reading 40 GB of weights would take minutes, so each tensor of a safetensors file is sampled: small tensors whole, large
ones in four pieces. A tensor that was trained, replaced or converted differs in every piece; an edit of a few numbers
between the pieces of a large tensor goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from leapalign.storage.files import PICKLES, read_json
from leapalign.storage.safetensors_header import read_header

PIECE = 64 * 2**10  # bytes
PIECES = 4  # per tensor; per other file larger than WHOLE: 4 * 256
WHOLE = 256 * 2**20  # bytes; other files up to this size are read whole
SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"}) | PICKLES
INDEX = "model_index.json"


def content_identity(file: Path) -> str:
    """Return SHA-256 of the file's size and content samples, as 64 hexadecimal digits. Raises OSError."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as stream:
        for start, length in _samples(file, size):
            stream.seek(start)
            digest.update(stream.read(length))
    return digest.hexdigest()


def folder_identity(folder: Path) -> dict[str, str]:
    """Relative path -> `content_identity`, for settings and weights in a folder and its direct subfolders.

    For a diffusers pipeline: its index, and the components that the index names. Skips hidden folders.
    """
    return {file.relative_to(folder).as_posix(): content_identity(file) for file in sorted(_files(folder))}


def _files(folder: Path) -> Iterator[Path]:
    if (folder / INDEX).is_file():
        yield folder / INDEX
        inner = [folder / name for name, part in read_json(folder / INDEX).items() if isinstance(part, list)]
    else:
        inner = [folder, *(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for place in inner:
        if place.is_dir():
            yield from (path for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _samples(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first byte, number of bytes) of each sample."""
    if file.suffix == ".safetensors":
        try:
            header = read_header(file)
        except ValueError:  # opening the file reports it
            header = {}
        ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        if ends:
            first = size - max(end for _, end in ends)
            yield 0, first
            for begin, end in ends:
                yield from _pieces(first + begin, end - begin, PIECES, PIECE)
            return
    yield from _pieces(0, size, PIECES * 256, WHOLE // (PIECES * 256))


def _pieces(start: int, length: int, pieces: int, piece: int) -> Iterator[tuple[int, int]]:
    """Yield `length` bytes whole if short, else `pieces` evenly spaced samples that include first and last byte."""
    if length <= pieces * piece:
        yield start, length
        return
    for i in range(pieces):
        yield start + (length - piece) * i // (pieces - 1), piece

"""The identity of weights and other files: what they hold, whatever their name, place and time.

Reading 40 GB of weights to compare them would take minutes, so of a safetensors file every tensor is sampled: small
tensors whole, of larger ones four pieces. A tensor that was trained, replaced or converted differs in every piece; an
edit of a few numbers between the pieces of a large tensor is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from leapalign.storage.files import PICKLES, read_json
from leapalign.storage.safetensors_header import read_header

PIECE = 64 * 2**10  # bytes
PIECES = 4  # of a tensor; of a file that is no safetensors file and above WHOLE: 4 * 256
WHOLE = 256 * 2**20  # bytes; other files up to this size are read whole
SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"}) | PICKLES
INDEX = "model_index.json"


def content_identity(file: Path) -> str:
    """SHA-256 over the file's size and samples of its content, 64 hexadecimal digits. Raises OSError."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as stream:
        for start, length in _samples(file, size):
            stream.seek(start)
            digest.update(stream.read(length))
    return digest.hexdigest()


def folder_identity(folder: Path) -> dict[str, str]:
    """Relative path -> identity, of the settings and weights in a folder and the folders in it.

    Of a diffusers pipeline: those of the components that its index names. A hidden folder does not count.
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
    """(first byte, number of bytes) of each sample."""
    if file.suffix == ".safetensors":
        try:
            header = read_header(file)
        except ValueError:  # whoever opens it says what is wrong with it
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
    """All of a stretch of bytes, or that many pieces at equal distances, the first and the last byte among them."""
    if length <= pieces * piece:
        yield start, length
        return
    for i in range(pieces):
        yield start + (length - piece) * i // (pieces - 1), piece

"""Locate a reward's files: the checkpoint, and the tokenizer beside it or in its published repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leapalign.rewards.base import Source
from leapalign.storage.embedded import resolve

FileSets = Sequence[Sequence[str]]  # one complete set is enough
CLIP_TOKENIZER: FileSets = (("tokenizer.json",), ("vocab.json", "merges.txt"))
BERT_TOKENIZER: FileSets = (("tokenizer.json",), ("vocab.txt", "tokenizer_config.json"))


def folder_of(path: str) -> str:
    """Return the folder of a local file; a folder or hub id is returned as it is."""
    return str(Path(path).parent) if Path(path).is_file() else path


def is_here(path: str) -> bool:
    """Return True for a local file or folder (embedded ones included), False for a hub id."""
    return Path(resolve(path)).exists()


def processor_for(path: str, given: str, sets: FileSets, published: str) -> str:
    """Return the tokenizer's folder or hub id: as given, else beside a local checkpoint, else as published."""
    folder = Path(folder_of(path))
    beside = any(all(Path(folder, file).is_file() for file in files) for files in sets)
    return given or (str(folder) if beside else published)


def published(field: str, path: str, files: dict[str, tuple[str, int]], *, weights: bool = True) -> Source:
    """Return the source at `path`; `files`: hub id -> the file that is read there, and its size in bytes (about)."""
    file, size = files.get(path, ("", 0))
    return Source(field=field, path=path, weights=weights, file=file, bytes=size)

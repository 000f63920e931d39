"""A pipeline folder laid out as the hub's cache lays it out: blobs named by hash, a snapshot of links, a ref."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_out(source: Path, cache: Path, repo: str, revision: str = "main") -> Path:
    """Large files (safetensors) by sha256, the others by git's hash; returns the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    for file in (f for f in sorted(source.rglob("*")) if f.is_file()):
        data = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(data) if large else hashlib.sha1(f"blob {len(data)}\0".encode() + data)
        blob = home / "blobs" / name.hexdigest()
        blob.write_bytes(data)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def share(file: Path) -> None:
    """Move a snapshot's blob into the store that all repositories of a cache share, as huggingface_hub 2.4 keeps it."""
    blob = file.parent.resolve() / file.readlink()
    own_name = hashlib.sha256(b"another kind of hash" + blob.read_bytes()).hexdigest()
    stored = blob.parents[2] / "blobs" / own_name[:2] / own_name
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))

"""Cache directory of prompt embeds: its place, its size limit, and pruning.

`LEAPALIGN_CACHE` sets the place, `LEAPALIGN_CACHE_GB` the limit, above which the least recently used entries are
removed; 0 keeps prompt embeds in memory only.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from leapalign.errors import UserError

LIMIT_GB = 100.0  # the paper's run on FLUX.1-dev meets 19,200 prompts of 4.2 MB
SCRATCH = ".tmp-"
STALE = 3600.0  # seconds after which a scratch file belongs to no living process


def place() -> Path:
    """Return `LEAPALIGN_CACHE`, or leapalign/prompts in the user's cache directory (XDG_CACHE_HOME, ~/.cache)."""
    if given := os.environ.get("LEAPALIGN_CACHE", ""):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "") or "~/.cache").expanduser() / "leapalign" / "prompts"


def limit() -> int:
    """Return the size limit in bytes; 0: nothing is written. Raises UserError for an invalid LEAPALIGN_CACHE_GB."""
    text = os.environ.get("LEAPALIGN_CACHE_GB", "") or str(LIMIT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise UserError(f"LEAPALIGN_CACHE_GB is {text!r}; expected gigabytes, as 100, or 0 for no cache on disk")
    return int(gigabytes * 1e9)


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Disk space that a run's prompt embeds will need, before any is encoded."""

    place: Path
    limit: int  # bytes
    free: int  # bytes on that disk
    needed: int  # bytes

    @property
    def problem(self) -> str:
        """Reason why the embeds do not fit, and what to do; empty if they fit."""
        if not self.limit:
            return ""
        remedy = "set LEAPALIGN_CACHE to a folder on a larger disk, or LEAPALIGN_CACHE_GB=0 to keep prompts in memory"
        if self.needed > self.limit:
            return (
                f"the prompts of this run take {gigabytes(self.needed)}, the cache at {self.place} may hold "
                f"{gigabytes(self.limit)}; raise LEAPALIGN_CACHE_GB, use fewer prompts or a shorter max_sequence_length"
            )
        if self.needed > self.free:
            needed, free = gigabytes(self.needed), gigabytes(self.free)
            return f"the prompts of this run take {needed}, {self.place} has {free} free; {remedy}"
        return ""


def cache_plan(prompts: int, bytes_each: int) -> CachePlan:
    """Plan the cache for `prompts` different prompts, none of them cached yet."""
    root = place()
    return CachePlan(place=root, limit=limit(), free=free_bytes(root), needed=prompts * bytes_each)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def prune(root: Path, most: int, keep: Iterable[Path] = ()) -> int:
    """Remove entries, least recently used first, until `most` bytes are left; returns the bytes removed."""
    kept, found, removed = set(keep), [], 0
    for file in entries(root):
        try:
            found.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:  # pruned by another process
            continue
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total - removed <= most:
            break
        if file not in kept:
            file.unlink(missing_ok=True)
            removed += size
    for file in root.glob(f"*/{SCRATCH}*"):
        if file.exists() and time.time() - file.stat().st_mtime > STALE:
            file.unlink(missing_ok=True)
    return removed


def entries(root: Path) -> Iterator[Path]:
    return root.glob("*/*.safetensors")


def free_bytes(root: Path) -> int:
    """Free bytes on the disk that holds, or will hold, the folder."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free

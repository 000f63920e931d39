"""List the files that a run needs from the hub, and which of them are in the hub's cache. Sends no request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leapalign.storage.hub import split_id
from leapalign.storage.pipeline_folder import INDEX


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file or a pipeline component on the hub."""

    repo: str
    what: str  # file or component; empty = unknown
    bytes: int  # approximate; 0 = unknown
    cached: bool = False


def hub_file(repo: str, file: str, size: int, repo_type: str = "model") -> Download:
    """Describe a repository's file of `size` bytes, and look it up in the hub's cache."""
    found = _cached(repo, file or "config.json", repo_type)
    return Download(repo=repo, what=file, bytes=size, cached=found is not None)


def pipeline_components(repo: str, sizes: dict[str, int]) -> list[Download]:
    """Describe a repository's components, and look them up in the hub's cache. `sizes`: component -> bytes."""
    found = _cached(repo, INDEX)
    snapshot = found.parent if found else None

    def here(component: str) -> bool:
        return snapshot is not None and any(snapshot.glob(f"{component}/*.safetensors"))

    return [
        Download(repo=repo, what=component, bytes=size, cached=here(component)) for component, size in sizes.items()
    ]


def _cached(hub_id: str, file: str, repo_type: str = "model") -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repo, revision = split_id(hub_id)
    found = try_to_load_from_cache(repo, file, revision=revision, repo_type=repo_type)
    return Path(found) if isinstance(found, str) else None

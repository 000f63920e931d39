"""What a run would fetch from the hub, and what of it is in the hub's cache. Nothing is asked of the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leapalign.storage.pipeline_folder import INDEX


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file, or a component of a pipeline."""

    repo: str
    what: str  # file or component; empty = not known
    bytes: int  # about; 0 = not known
    cached: bool = False


def hub_file(repo: str, file: str, size: int, repo_type: str = "model") -> Download:
    """A file of a repository."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file or "config.json", repo_type=repo_type)
    return Download(repo=repo, what=file, bytes=size, cached=isinstance(found, str))


def pipeline_components(repo: str, sizes: dict[str, int]) -> list[Download]:
    """Each component with weights: its bytes as published."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, INDEX)
    snapshot = Path(found).parent if isinstance(found, str) else None

    def here(component: str) -> bool:
        return snapshot is not None and any(snapshot.glob(f"{component}/*.safetensors"))

    return [
        Download(repo=repo, what=component, bytes=size, cached=here(component)) for component, size in sizes.items()
    ]

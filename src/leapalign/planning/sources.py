"""Find the pipeline's configurations: a local folder, the hub's cache, or those that ship in the family's file.

Nothing is downloaded. Configurations in the user's hub cache take precedence over shipped ones, because the run will
use them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.errors import UserError
from leapalign.models.published import Published
from leapalign.storage.hub import cached_folder, is_hub_id
from leapalign.storage.pipeline_folder import INDEX, components_of, read_json

FLOAT32 = 4  # bytes a weight


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pipeline's configurations, and the source of its weights."""

    folder: Path  # the configurations
    hub_id: str = ""  # empty for a local folder, which holds its weights
    facts: Published | None = None  # about this hub id, from the family's file
    shipped: bool = False  # `folder` was written from `facts`

    @property
    def bytes_per_weight(self) -> int:
        """Bytes per weight in the published files; float32's 4 if unknown."""
        return self.facts.bytes_per_weight if self.facts else FLOAT32


@contextmanager
def locate(path: str, published: Mapping[str, Published]) -> Iterator[Source]:
    """Yield the source of a model's `path`. `published`: hub id -> facts, from the family's file.

    Raises UserError if the path is no local folder and is neither in the hub's cache nor in `published`.
    """
    from leapalign.storage.embedded import resolve

    here, facts = Path(resolve(path)).expanduser(), published.get(path)
    if here.exists():
        yield Source(folder=here)
    elif (cached := _cached(path)) is not None:
        yield Source(folder=cached, hub_id=path, facts=facts)
    elif facts is not None:
        with tempfile.TemporaryDirectory(prefix="leapalign-plan-") as scratch:
            write_configs(facts, Path(scratch))
            yield Source(folder=Path(scratch), hub_id=path, facts=facts, shipped=True)
    else:
        raise UserError(
            f"{path!r} is not a local folder, its configurations are not in the hub's cache, and leapalign does not "
            f"ship its sizes (only those of {', '.join(published) or 'no model of this family'}). Give a local "
            f"pipeline folder, or fetch it first: `hf download {path}`"
        )


def _cached(path: str) -> Path | None:
    """Return the snapshot in the hub's cache if it has every model's and the scheduler's configuration; else None."""
    folder = cached_folder(path) if is_hub_id(path) else None
    if folder is None or not (folder / INDEX).is_file():
        return None
    components = [name for name in components_of(read_json(folder / INDEX)) if not name.startswith("tokenizer")]
    whole = all(any((folder / name).glob("*config.json")) for name in components)
    return folder if whole else None


def write_configs(pipeline: Published, folder: Path) -> None:
    """Write a pipeline folder with configurations and without weights."""
    index: dict[str, Any] = {"_class_name": pipeline.kind, **pipeline.index}
    for name, (kind, config) in pipeline.components.items():
        index[name] = kind.split(".")
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        if config:
            (folder / name / file).write_text(json.dumps({"_class_name": kind.split(".")[1], **config}))
    (folder / INDEX).write_text(json.dumps(index))

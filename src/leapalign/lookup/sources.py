"""The model that a word names: a run's folder, a diffusers pipeline folder, a hub id or `embedded:generator`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from leapalign.errors import UserError
from leapalign.lookup.catalog import listing
from leapalign.lookup.recipes import read_run
from leapalign.lookup.runs import check_run_folder
from leapalign.models.base import pointed_at
from leapalign.run import Run
from leapalign.tuning.full import FULL

STEPS = 25  # sampling steps of a model that no run trained


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model, not yet loaded."""

    model: Any  # a dataclass of leapalign.models
    num_steps: int  # sampling steps
    saved: str  # tuned weights: a pipeline folder, hub id or embedded:NAME, or an adapter's folder
    tuning: Any = FULL  # a dataclass of leapalign.tuning

    def load(self, device: str, dtype: str) -> Any:
        """The tuned model."""
        return self.tuning.load_tuned(self.model, self.saved, device, dtype)

    def changed(self, *, size: int = 0, guidance_scale: float = -1.0) -> Source:
        """The same model at another height and width (0 = as it is) and guidance scale (-1 = as it is)."""
        changes: dict[str, Any] = {"height": size, "width": size} if size else {}
        changes |= {"guidance_scale": guidance_scale} if guidance_scale >= 0 else {}
        return replace(self, model=replace(self.model, **changes))


def find_source(source: str, plugins: dict[str, ModuleType]) -> Source:
    """The model of a run's folder, a pipeline folder, a hub id or `embedded:NAME`. Raises UserError."""
    check_run_folder(source)
    folder = Path(source)
    if (folder / "run.json").is_file():
        return run_source(folder, read_run(folder / "run.json", plugins))
    if source.startswith("embedded:"):
        from leapalign.recipes import shapeworld_leapalign

        run = shapeworld_leapalign()
        return Source(model=pointed_at(run.model, source), num_steps=run.num_sampling_steps, saved=source)
    return Source(model=config_for(source), num_steps=STEPS, saved=source)


def run_source(folder: Path, run: Run) -> Source:
    """The tuned model of a finished run. Raises UserError if the run is not finished."""
    saved = folder / run.tuning.output
    if not saved.is_dir():
        raise UserError(
            f"{folder}: this run is not finished, it has no {run.tuning.output} yet; use `leapalign resume {folder}`"
        )
    return Source(model=run.model, num_steps=run.num_sampling_steps, saved=str(saved), tuning=run.tuning)


def families() -> dict[str, Any]:
    """diffusers' pipeline class -> configuration class of every model family."""
    found = {}
    for entry in listing(("models",))["models"]:
        module, _, cls = entry["type"].rpartition(".")
        config = getattr(importlib.import_module(module), cls)
        found[config.pipeline] = config
    return found


def config_for(source: str) -> Any:
    """The configuration at its default settings of a pipeline folder, a hub id (fetched) or `embedded:NAME`."""
    from leapalign.storage.pipeline_folder import INDEX, locate, read_json

    index, known = read_json(locate(source) / INDEX), families()
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{source}: it holds a {name}; expected one of {', '.join(sorted(known))}")
    return known[name](path=source)

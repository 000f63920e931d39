"""Resolve a word to a model: a run's folder, a diffusers pipeline folder, a hub id or `embedded:generator`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leapalign.checkpoint.inputs import base_changes
from leapalign.codec import encode
from leapalign.errors import UserError
from leapalign.lookup.recipes import read_run
from leapalign.lookup.runs import check_run_folder
from leapalign.models import FAMILIES
from leapalign.models.base import Family
from leapalign.run import Run
from leapalign.tuning.full import FULL
from leapalign.tuning.strength import check_strength

if TYPE_CHECKING:
    from leapalign.evaluation.exchange import Ends

STEPS = 25  # sampling steps of a model that no run trained
OTHER_BASE = "the base is not the one that this run was trained on"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that is not loaded yet."""

    model: Any  # a dataclass of leapalign.models
    num_steps: int  # sampling steps
    saved: str  # tuned weights: a pipeline folder, hub id or embedded:NAME, or an adapter's folder
    tuning: Any = FULL  # a dataclass of leapalign.tuning
    strength: float = 1.0  # of the tuning: base + strength (tuned - base)

    def load(self, device: str, dtype: str) -> Any:
        """The tuned model."""
        return self.tuning.load_tuned(self.model, self.saved, device, dtype, self.strength)

    def load_with_base(self, device: str, dtype: str) -> Ends:
        """The tuned model and its base: an adapter is one model, which is switched off; weights are loaded twice."""
        from leapalign.evaluation.exchange import Ends
        from leapalign.models.pipeline import PipelineModel

        tuned = self.load(device, dtype)
        if self.tuning.output != FULL.output and isinstance(tuned, PipelineModel):
            return Ends(base=tuned, tuned=tuned, as_base=tuned.reference)
        return Ends(base=replace(self, strength=0.0).load(device, dtype), tuned=tuned)

    def record(self) -> dict[str, Any]:
        """Return everything that determines this model's images, except sampling settings, as JSON values.

        Local weights are identified by names, sizes and times of their files, so that retrained weights differ.
        """
        model = {key: value for key, value in encode(self.model).items() if key != "path"}
        found = {"model": model, "base": _weights(self.model.path), "tuned": _weights(self.saved)}
        return found if self.strength == 1 else found | {"strength": self.strength}  # folders of before lack it

    def changed(self, *, size: int = 0, guidance_scale: float = -1.0) -> Source:
        """Return the model with another height and width (0 = unchanged) and guidance scale (-1 = unchanged)."""
        changes: dict[str, Any] = {"height": size, "width": size} if size else {}
        changes |= {"guidance_scale": guidance_scale} if guidance_scale >= 0 else {}
        return replace(self, model=replace(self.model, **changes))


def find_source(source: str, plugins: dict[str, ModuleType], strength: float = 1.0) -> Source:
    """Resolve a run's folder, a pipeline folder, a hub id or `embedded:NAME`. Raises UserError.

    `strength` in [0, 2]: of a run's tuning; another model has no base to mix with, and takes 1 alone.
    """
    check_run_folder(source)
    folder = Path(source)
    if (folder / "run.json").is_file():
        return run_source(folder, read_run(folder / "run.json", plugins), strength)
    if strength != 1:
        raise UserError(
            f"{source}: a strength of {strength:g} mixes a run's tuned weights with its base, and this is not a run's "
            "folder; give a run, or leave out --strength"
        )
    if source.startswith("embedded:"):
        from leapalign.recipes import shapeworld_leapalign

        run = shapeworld_leapalign()
        return Source(model=run.model.at(source), num_steps=run.num_sampling_steps, saved=source)
    return Source(model=config_for(source, plugins), num_steps=STEPS, saved=source)


def run_source(folder: Path, run: Run, strength: float = 1.0) -> Source:
    """The tuned model of a finished run. Raises UserError if the run is not finished, or as `check_base`."""
    saved = folder / run.tuning.output
    if not saved.is_dir():
        raise UserError(
            f"{folder}: this run is not finished, it has no {run.tuning.output} yet; use `leapalign resume {folder}`"
        )
    check_base(folder, run, strength)
    return Source(
        model=run.model, num_steps=run.num_sampling_steps, saved=str(saved), tuning=run.tuning, strength=strength
    )


def check_base(folder: Path, run: Run, strength: float) -> None:
    """Compare the base with the one that the run was trained on, if the tuned model at this strength needs it.

    Warns about an adapter on another base. Raises UserError for weights tuned in place, whose difference from another
    base means nothing, and for a strength outside [0, 2].
    """
    check_strength(strength)
    in_place = run.tuning.output == FULL.output
    if (in_place and strength == 1) or not (changes := base_changes(run, folder)):
        return
    told = f"{folder}: {OTHER_BASE}"
    if in_place:
        raise UserError(
            f"{told}, and a strength of {strength:g} mixes the tuned weights with it: {'; '.join(changes)}. Put it "
            f"back at {run.model.path} (fetch a hub id: `hf download`), or use a strength of 1"
        )
    warnings.warn(f"{told}, and its images are not the trained model's: {'; '.join(changes)}", stacklevel=3)


def find_tuned(word: str, plugins: dict[str, ModuleType]) -> Source:
    """Return the tuned model of a finished run's folder, whose base is there. Raises UserError for anything else."""
    check_run_folder(word)
    folder = Path(word)
    if not (folder / "run.json").is_file():
        raise UserError(f"{word}: expected the folder of a finished run, which has a base and a tuned model")
    run = read_run(folder / "run.json", plugins)
    source = run_source(folder, run)
    if run.tuning.output == FULL.output and (changes := base_changes(run, folder)):
        raise UserError(
            f"{folder}: {OTHER_BASE}, and the tuned model is compared with it: {'; '.join(changes)}. Put it back at "
            f"{run.model.path} (fetch a hub id: `hf download`)"
        )
    return source


def families(plugins: Mapping[str, ModuleType]) -> dict[str, Any]:
    """Return diffusers pipeline class -> configuration class. A user's own family takes precedence."""
    found: dict[str, Any] = {family.pipeline: family for family in FAMILIES}
    for module in plugins.values():
        own: list[Any] = [c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__]
        found |= {c.pipeline: c for c in own if hasattr(c, "pipeline")}  # only families have one
    return found


def _weights(path: str) -> str:
    """Return a digest of the files of a local folder; a hub id or `embedded:NAME` unchanged."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    files = [(file, file.stat()) for file in sorted(folder.rglob("*")) if file.is_file()]
    seen = [(str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for file, stat in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def config_for(source: str, plugins: Mapping[str, ModuleType]) -> Family:
    """Return the default configuration for a pipeline folder, a hub id (fetched) or `embedded:NAME`."""
    from leapalign.storage.pipeline_folder import INDEX, locate, read_json

    index, known = read_json(locate(source) / INDEX), families(plugins)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{source}: it holds a {name}; expected one of {', '.join(sorted(known))}, or --plugin FILE with a family "
            "of your own that opens it"
        )
    return known[name](path=source)

"""`leapalign sample`: which model a word means, and its pictures as PNG files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leapalign.distributed.world import resolve_device
from leapalign.errors import UserError
from leapalign.evaluation.image_folder import picture_paths, refuse_existing, write_pictures
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.lookup.families import config_for
from leapalign.lookup.recipes import load_plugins, read_run
from leapalign.models.base import pointed_at
from leapalign.prompts import Prompt
from leapalign.prompts.base import check_text
from leapalign.run import Run
from leapalign.storage.atomic import disk_errors
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from leapalign.cli.sample import SampleFlags

STEPS = 25  # where no run says how many


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a word names, not yet loaded."""

    model: Any  # a dataclass of leapalign.models
    num_steps: int
    saved: str  # what the way of tuning left: a pipeline folder (or a known path), or an adapter's folder
    tuning: Any = FULL  # a dataclass of leapalign.tuning

    def load(self, device: str, dtype: str) -> Any:
        """The tuned model."""
        return self.tuning.load_tuned(self.model, self.saved, device, dtype)


def sample(flags: SampleFlags) -> list[dict[str, Any]]:
    """Write the pictures, in GenEval's layout; [{"prompt", "path"}] for each."""
    prompts = [Prompt(text=check_text(text, "--prompt")) for text in flags.prompt]
    _sampling(flags, 1)  # its numbers, before anything is loaded
    refuse_existing(picture_paths(flags.out, len(prompts), flags.num), flags.overwrite)
    source = find_source(flags.source, load_plugins(flags.plugin))
    source = replace(source, model=_with_flags(source.model, flags))
    model = source.load(resolve_device(flags.device), flags.dtype)
    images = draw_images(model, [prompt.text for prompt in prompts], _sampling(flags, source.num_steps))
    with disk_errors(flags.out, "give another --out"):
        paths = write_pictures(flags.out, prompts, images, per_prompt=flags.num, overwrite=flags.overwrite)
    return [{"prompt": prompts[i // flags.num].text, "path": str(path)} for i, path in enumerate(paths)]


def _sampling(flags: SampleFlags, usual_steps: int) -> Sampling:
    return Sampling(num_steps=flags.steps or usual_steps, images_per_prompt=flags.num, batch_size=1, seed=flags.seed)


def find_source(source: str, plugins: dict[str, ModuleType]) -> Source:
    """What a run's folder, a pipeline folder, or a known path stands for."""
    folder = Path(source)
    if (folder / "run.json").is_file():
        return run_source(folder, read_run(folder / "run.json", plugins))
    if source.startswith("embedded:"):
        from leapalign.recipes import shapeworld_leapalign

        run = shapeworld_leapalign()
        return Source(model=pointed_at(run.model, source), num_steps=run.num_sampling_steps, saved=source)
    return Source(model=config_for(source), num_steps=STEPS, saved=source)


def run_source(folder: Path, run: Run) -> Source:
    """The tuned model of a finished run. UserError where it is not finished."""
    saved = folder / run.tuning.output
    if not saved.is_dir():
        raise UserError(
            f"{folder}: this run is not finished, it has no {run.tuning.output} yet; use `leapalign resume {folder}`"
        )
    return Source(model=run.model, num_steps=run.num_sampling_steps, saved=str(saved), tuning=run.tuning)


def _with_flags(config: Any, flags: SampleFlags) -> Any:
    """Size and guidance of the flags, where they are given."""
    changes: dict[str, Any] = {}
    if flags.size:
        changes |= {"height": flags.size, "width": flags.size}
    if flags.guidance >= 0:
        changes |= {"guidance_scale": flags.guidance}
    return replace(config, **changes)

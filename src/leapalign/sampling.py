"""`leapalign sample`: which model a word means, and its pictures as PNG files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leapalign.errors import UserError
from leapalign.evaluation.folders import picture_paths, refuse_existing, write_pictures
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.models.families import config_for
from leapalign.prompts import Prompt
from leapalign.recipe_files import load_plugins, read_run
from leapalign.training.loop import resolve_device

if TYPE_CHECKING:
    from leapalign.cli import SampleFlags

STEPS = 25  # where no run says how many


def sample(flags: SampleFlags) -> list[dict[str, Any]]:
    """Write the pictures, in GenEval's layout; [{"prompt", "path"}] for each."""
    prompts = [Prompt(text=text) for text in flags.prompt]
    refuse_existing(picture_paths(flags.out, len(prompts), flags.num), flags.overwrite)
    config, num_steps = model_config(flags.source, load_plugins(flags.plugin))
    model = _with_flags(config, flags).load(resolve_device(flags.device), flags.dtype)
    sampling = Sampling(num_steps=flags.steps or num_steps, images_per_prompt=flags.num, batch_size=1, seed=flags.seed)
    images = draw_images(model, flags.prompt, sampling)
    paths = write_pictures(flags.out, prompts, images, per_prompt=flags.num, overwrite=flags.overwrite)
    return [{"prompt": flags.prompt[i // flags.num], "path": str(path)} for i, path in enumerate(paths)]


def model_config(source: str, plugins: dict[str, ModuleType]) -> tuple[Any, int]:
    """A model's configuration and its number of steps, from a run's folder, a pipeline folder, or a known path."""
    folder = Path(source)
    if (folder / "run.json").is_file():
        run = read_run(folder / "run.json", plugins)
        if not (folder / "pipeline").is_dir():
            raise UserError(
                f"{source}: this run is not finished, it has no pipeline yet; use `leapalign resume {source}`"
            )
        return pointed_at(run.model, str(folder / "pipeline")), run.num_sampling_steps
    if source.startswith("embedded:"):
        from leapalign.recipes import shapeworld_leapalign

        run = shapeworld_leapalign()
        return pointed_at(run.model, source), run.num_sampling_steps
    return config_for(source), STEPS


def pointed_at(config: Any, folder: str) -> Any:
    """The same settings on another folder, with that folder's own weights: no single file stands for them there."""
    alone = {"transformer_file": ""} if hasattr(config, "transformer_file") else {}
    return replace(config, path=folder, **alone)


def _with_flags(config: Any, flags: SampleFlags) -> Any:
    """Size and guidance of the flags, where they are given."""
    changes: dict[str, Any] = {}
    if flags.size:
        changes |= {"height": flags.size, "width": flags.size}
    if flags.guidance >= 0:
        changes |= {"guidance_scale": flags.guidance}
    return replace(config, **changes)

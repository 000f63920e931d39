"""`leapalign sample`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.lookup.recipes import load_plugins
from leapalign.lookup.sources import STEPS, find_source
from leapalign.prompts import Prompt
from leapalign.prompts.base import check_text
from leapalign.storage.atomic import disk_errors


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """Draw images with a run's tuned weights, a pipeline folder, or embedded:generator."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    prompt: tuple[str, ...]
    """Prompts; each gives its own images."""
    out: Path = Path("samples")
    """Folder for the PNG files."""
    overwrite: bool = False
    """Replace existing images."""
    num: int = 1
    """Images per prompt."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    size: int = 0
    """Height and width in pixels; 0 = as in the run, or the family's usual size."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    strength: float = 1.0
    """base + strength (tuned - base) of a run, from 0 to 2: 0 = the base, 1 = as trained; less keeps more variety."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the images' paths as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


def sample_command(argv: list[str]) -> None:
    flags = tyro.cli(SampleFlags, args=argv, prog="leapalign sample")
    images = _sample(flags)
    answer(images, flags.json, "\n".join(image["path"] for image in images))


def _sample(flags: SampleFlags) -> list[dict[str, Any]]:
    """Write the images in GenEval's layout; return [{"prompt", "path"}], one per image."""
    from leapalign.distributed.process_group import resolve_device
    from leapalign.evaluation.image_folder import image_paths, refuse_existing
    from leapalign.evaluation.sampling import Sampling, draw_files
    from leapalign.models.pipeline import tell_longer_prompts

    prompts = [Prompt(text=check_text(text, "--prompt")) for text in flags.prompt]
    sampling = Sampling(num_steps=flags.steps or STEPS, images_per_prompt=flags.num, batch_size=1, seed=flags.seed)
    paths = image_paths(flags.out, len(prompts), flags.num)
    refuse_existing(paths, flags.overwrite)
    source = find_source(flags.source, load_plugins(flags.plugin), flags.strength)
    source = source.changed(size=flags.size, guidance_scale=flags.guidance)
    model = source.load(resolve_device(flags.device), flags.dtype)
    sampling = replace(sampling, num_steps=flags.steps or source.num_steps)
    tell_longer_prompts(model, [prompt.text for prompt in prompts])
    with disk_errors(flags.out, "give another --out"):
        for path in paths:
            path.unlink(missing_ok=True)
        draw_files(model, prompts, sampling, flags.out)
    return [{"prompt": prompts[i // flags.num].text, "path": str(path)} for i, path in enumerate(paths)]

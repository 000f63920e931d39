"""`leapalign sample`: pictures as PNG files, through the same adapters and the same rollout as training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.recipe_files import read_run
from leapalign.seeds import generator
from leapalign.training.loop import resolve_device

if TYPE_CHECKING:
    from leapalign.cli import SampleFlags

STEPS = 25  # where no run says how many


def sample(flags: SampleFlags) -> list[dict[str, Any]]:
    """Write the pictures; [{"prompt", "seed", "path"}]. Picture i of a prompt has the same noise for every prompt."""
    config, num_steps = model_config(flags.source)
    config = _with_flags(config, flags)
    model = config.load(resolve_device(flags.device), flags.dtype)
    model.prepare(list(flags.prompt))
    flags.out.mkdir(parents=True, exist_ok=True)
    sigmas = model.sigmas(flags.steps or num_steps)
    pictures = []
    for row, prompt in enumerate(flags.prompt):
        for i in range(flags.num):
            path = flags.out / f"{row:03d}-{i:02d}.png"
            _save_png(draw(model, prompt, sigmas, flags.seed, i), path)
            pictures.append({"prompt": prompt, "seed": flags.seed, "path": str(path)})
    return pictures


@torch.no_grad()
def draw(model: Any, prompt: str, sigmas: torch.Tensor, seed: int, index: int) -> torch.Tensor:
    """One image [3, H, W] in [0, 1]."""
    device = next(model.policy.parameters()).device
    x = model.noise([generator(seed, step=0, sample=index, purpose="sample")]).to(device)
    x_0 = rollout(model.velocity(model.encode([prompt])), x, sigmas.to(device))
    return model.decode(x_0)[0]


def model_config(source: str) -> tuple[Any, int]:
    """A model's configuration and its number of steps, from a run's folder, a pipeline folder, or a known path."""
    folder = Path(source)
    if (folder / "run.json").is_file():
        run = read_run(folder / "run.json", {})
        if not (folder / "pipeline").is_dir():
            raise UserError(
                f"{source}: this run is not finished, it has no pipeline yet; use `leapalign resume {source}`"
            )
        return replace(run.model, path=str(folder / "pipeline")), run.num_sampling_steps
    if source.startswith("embedded:"):
        from leapalign.recipes import shapeworld_leapalign

        run = shapeworld_leapalign()
        return replace(run.model, path=source), run.num_sampling_steps
    return _family(source)(source), STEPS


def _family(source: str) -> Callable[[str], Any]:
    """The model class that opens this pipeline."""
    from leapalign.models.flux import Flux
    from leapalign.models.sd3 import SD3

    families = {"StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux}
    name = _class_name(source)
    if name not in families:
        raise UserError(f"{source}: it holds a {name}; expected one of {', '.join(families)}")
    return lambda path: families[name](path=path)


def _class_name(source: str) -> str:
    index = Path(source) / "model_index.json"
    if not Path(source).exists():
        raise UserError(f"{source}: there is no such folder; give a run, a pipeline folder or embedded:generator")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{source}: neither run.json nor a readable model_index.json is in there") from None


def _with_flags(config: Any, flags: SampleFlags) -> Any:
    changes: dict[str, Any] = {}
    if flags.size:
        changes |= {"height": flags.size, "width": flags.size}
    if flags.guidance >= 0:
        changes |= {"guidance_scale": flags.guidance}
    return replace(config, **changes)


def _save_png(image: torch.Tensor, path: Path) -> None:
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)

"""GenEval's folder layout (github.com/djghosh13/geneval): 00000/metadata.jsonl and 00000/samples/0000.png, ..."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from leapalign.errors import UserError
from leapalign.images import read_image, to_pil, to_tensor
from leapalign.prompts import Prompt


def image_paths(folder: Path, num_prompts: int, per_prompt: int) -> list[Path]:
    return [folder / f"{i:05d}" / "samples" / f"{n:04d}.png" for i in range(num_prompts) for n in range(per_prompt)]


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """UserError where a file would be replaced that nobody said may be."""
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        raise UserError(f"{taken[0]} exists ({len(taken)} files would be replaced); give another folder, or overwrite")


def write_images(
    folder: Path, prompts: Sequence[Prompt], images: Tensor, *, per_prompt: int = 1, overwrite: bool = False
) -> list[Path]:
    """Images [P * per_prompt, 3, H, W], prompt by prompt, as PNG files with each prompt's metadata beside them."""
    paths = image_paths(folder, len(prompts), per_prompt)
    if len(paths) != len(images):
        raise ValueError(f"{len(images)} images are not {per_prompt} each for {len(prompts)} prompts")
    metadata = [folder / f"{i:05d}" / "metadata.jsonl" for i in range(len(prompts))]
    refuse_existing([*paths, *metadata], overwrite)
    for path, image in zip(paths, images):
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(image).save(path)
    for path, prompt in zip(metadata, prompts):
        path.write_text(json.dumps(prompt.metadata or {"prompt": prompt.text}) + "\n", encoding="utf-8")
    return paths


def read_images(folder: Path) -> Iterator[tuple[Prompt, Tensor]]:
    """Each picture [3, H, W] in [0, 1] with its prompt, in order; whoever drew them."""
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        record = json.loads(metadata.read_text(encoding="utf-8"))
        for path in sorted((metadata.parent / "samples").glob("*.png")):
            yield Prompt(record["prompt"], record), to_tensor(read_image(path))

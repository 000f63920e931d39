"""GenEval's folder layout (github.com/djghosh13/geneval): 00000/metadata.jsonl and 00000/samples/0000.png, ...

Images are written one by one and atomically, so a killed evaluation continues where it stopped.
`images.json` records the settings that determine the images: a folder never mixes images of two settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from leapalign.errors import RunStopped, UserError
from leapalign.images import check_image, read_image, to_pil, to_tensor
from leapalign.prompts import Prompt
from leapalign.run import differences
from leapalign.storage.atomic import SCRATCH, write_text

RECORD = "images.json"


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk: `files[i]` reads one as [3, H, W] in [0, 1]."""

    paths: tuple[Path, ...]
    held: TemporaryDirectory[str] | None = None  # a temporary folder that lives as long as its images are in use

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(read_image(self.paths[index]))


def image_paths(folder: Path, num_prompts: int, per_prompt: int) -> list[Path]:
    """Return the paths of all images, prompt by prompt."""
    return [folder / f"{i:05d}" / "samples" / f"{n:04d}.png" for i in range(num_prompts) for n in range(per_prompt)]


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError if a file exists and may not be replaced."""
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        raise UserError(f"{taken[0]} exists ({len(taken)} files would be replaced); give another folder, or overwrite")


def begin_or_continue(folder: Path, settings: Mapping[str, Any], paths: Sequence[Path], *, overwrite: bool) -> int:
    """Prepare a folder for images of these settings (JSON values); return how many of `paths` exist already.

    With `overwrite` they are removed first. Raises UserError if the folder has images of other settings, or of none.
    """
    record = folder / RECORD
    if overwrite:
        for path in (record, *paths):
            path.unlink(missing_ok=True)
    if record.is_file():
        _refuse_other_settings(record, settings)
    else:
        refuse_existing(paths, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2) + "\n")
    return sum(path.exists() for path in paths)


def _refuse_other_settings(record: Path, settings: Mapping[str, Any]) -> None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{record}: not JSON; give another folder, or overwrite") from None
    if changed := differences(found, json.loads(json.dumps(settings))):
        raise UserError(
            f"{record.parent} has images made with other settings ({'; '.join(changed)}); give another folder, or "
            "overwrite"
        )


def is_whole(path: Path) -> bool:
    """Return True if the file exists and starts like an image: a crash of the machine may leave an empty file."""
    try:
        check_image(path)
    except UserError:
        return False
    return True


def write_image(path: Path, image: Tensor, prompt: Prompt) -> None:
    """Write [3, H, W] in [0, 1] as PNG, and the metadata of its prompt.

    Raises RunStopped for NaN and infinity, which a file cannot hold.
    """
    if not image.isfinite().all():
        raise RunStopped(f"the image for the prompt {prompt.text!r}: its pixels are not finite numbers")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata, text = path.parents[1] / "metadata.jsonl", json.dumps(prompt.metadata or {"prompt": prompt.text}) + "\n"
    if not metadata.is_file() or metadata.read_text(encoding="utf-8") != text:
        metadata.write_text(text, encoding="utf-8")
    scratch = path.with_name(f"{SCRATCH}{path.name}")
    to_pil(image).save(scratch, format="PNG")
    os.replace(scratch, path)


def read_images(folder: Path) -> Iterator[tuple[Prompt, Tensor]]:
    """Yield each image [3, H, W] in [0, 1] with its prompt, in order; the folder may be written by any program."""
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        record = json.loads(metadata.read_text(encoding="utf-8"))
        for path in sorted((metadata.parent / "samples").glob("*.png")):
            yield Prompt(record["prompt"], record), to_tensor(read_image(path))

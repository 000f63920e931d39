"""`leapalign score`: rewards of picture files, through Pillow, as published scores were made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.codec import suggestion
from leapalign.distributed.world import resolve_device
from leapalign.errors import RunStopped, UserError
from leapalign.lookup.recipes import load_file
from leapalign.prompts import PromptFile
from leapalign.prompts.base import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from leapalign.cli.score import ScoreFlags

Row = dict[str, Any]  # {"image", "prompt", "scores": {reward: number or None}}


def score_files(flags: ScoreFlags) -> list[Row]:
    """A row a picture, in the order given. None where a reward that answers in words gave no number."""
    configs = {word: reward_config(word) for word in flags.reward}
    prompts = _prompts(flags)
    pictures = [read_picture(path) for path in flags.images]
    device = resolve_device(flags.device)
    rows: list[Row] = [{"image": str(i), "prompt": p, "scores": {}} for i, p in zip(flags.images, prompts)]
    for word, config in configs.items():
        reward = config.load(device, flags.dtype)
        for start in range(0, len(rows), flags.batch_size):
            part = slice(start, start + flags.batch_size)
            values = reward.score_pictures(pictures[part], prompts[part]).tolist()
            for row, value in zip(rows[part], values):
                row["scores"][word] = _number(value, word, config, row)
    return rows


def reward_config(word: str) -> Any:
    """NAME, NAME=PATH, or file.py:name (a function or a dataclass of your own; the file is executed)."""
    if ".py:" in word:
        return _own(word)
    name, given, path = word.partition("=")
    classes = reward_classes()
    if name not in classes:
        raise UserError(
            f"there is no reward {name!r}{suggestion(name, classes)}; "
            f"use one of {', '.join(classes)}, NAME=PATH, or file.py:name"
        )
    fields = {field.name for field in dataclasses.fields(classes[name])}
    if given and "path" not in fields:
        raise UserError(f"{word}: the reward {name} has no path; give {name} alone")
    if name == "custom":
        raise UserError("custom: give your own function as --reward my_file.py:name")
    return classes[name](path=path) if given else classes[name]()


def reward_classes() -> dict[str, Any]:
    """name -> configuration class, of every file in rewards/."""
    import importlib

    from leapalign.lookup.catalog import listing

    found = {}
    for entry in listing(("rewards",))["rewards"]:
        module, _, cls = entry["type"].rpartition(".")
        found[entry["name"]] = getattr(importlib.import_module(module), cls)
    return found


def _own(word: str) -> Any:
    from leapalign.rewards.custom import Custom

    file, _, name = word.rpartition(":")
    module = load_file(file)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{word}: there is no {name!r} in the file{suggestion(name, vars(module))}")
    return found() if hasattr(found, "load") else Custom(function=word)


def _prompts(flags: ScoreFlags) -> list[str]:
    """One prompt an image; a single one stands for all."""
    if not flags.images:
        raise UserError("score: give picture files, as in `leapalign score a.png b.png --reward ... --prompt ...`")
    if not flags.reward:
        raise UserError("score: give at least one --reward; `leapalign list rewards` has them all")
    if bool(flags.prompt) == bool(flags.prompts):
        raise UserError('score: give either --prompt "..." (one for all, or one an image), or --prompts FILE')
    texts = [check_text(text, "--prompt") for text in flags.prompt]
    texts = texts or [prompt.text for prompt in PromptFile(path=flags.prompts).load()]
    if len(texts) not in (1, len(flags.images)):
        raise UserError(f"score: {len(flags.images)} images and {len(texts)} prompts; give one, or one an image")
    return texts * len(flags.images) if len(texts) == 1 else texts


def read_picture(path: Path) -> Image:
    """An RGB picture; transparency is dropped, as the published packages do."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); give PNG, JPEG or WebP") from None


def _number(value: float, word: str, config: Any, row: Row) -> float | None:
    if math.isfinite(value):
        return value
    if getattr(config, "differentiable", True):
        raise RunStopped(f"{word}: the score of {row['image']} is {value}, for the prompt {row['prompt']!r}")
    return None  # an answer in words without a number in it


def as_text(rows: Sequence[Row]) -> str:
    """A table for a terminal, with means below where there are several pictures."""
    words = list(rows[0]["scores"])
    width = max(len("mean"), *(len(row["image"]) for row in rows))
    lines = [f"{'image':{width}}  " + "  ".join(f"{word:>12}" for word in words)]
    for row in rows:
        lines.append(f"{row['image']:{width}}  " + "  ".join(_cell(row["scores"][w], w) for w in words))
    if len(rows) > 1:
        known = {w: [v for row in rows if (v := row["scores"][w]) is not None] for w in words}
        means = {w: sum(values) / len(values) if values else None for w, values in known.items()}
        lines.append(f"{'mean':{width}}  " + "  ".join(_cell(means[w], w) for w in words))
    return "\n".join(lines)


def _cell(value: float | None, word: str) -> str:
    text = "no number" if value is None else f"{value:.4f}"
    return f"{text:>{max(12, len(word))}}"

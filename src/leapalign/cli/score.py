"""`leapalign score`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import RunStopped, UserError
from leapalign.images import check_image, read_image
from leapalign.lookup.rewards import reward_config
from leapalign.prompts import PromptFile
from leapalign.prompts.base import check_text
from leapalign.report.tables import score_table
from leapalign.rewards.adapt import load_reward, tell_longer
from leapalign.rewards.base import Reward, UnfitImage

if TYPE_CHECKING:
    from PIL.Image import Image

Row = dict[str, Any]  # {"image", "prompt", "scores": {reward: number or None}}


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Score image files with rewards, preprocessed by Pillow as in the published packages."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    reward: tuple[str, ...]
    """NAME (leapalign list rewards), NAME=PATH for other weights, with settings of it (hpsv2=PATH,processor=FOLDER), or
    file.py:name of your own, which is executed."""
    prompt: tuple[str, ...] = ()
    """Prompt of all images, or one prompt per image."""
    prompts: str = ""
    """Instead of --prompt: a .txt, .jsonl or .csv file with one prompt per image."""
    batch_size: int = 8
    """Images at a time; changes memory and time only."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the reward's weights."""
    json: bool = False
    """Print one row per image as JSON on stdout."""


def score_command(argv: list[str]) -> None:
    flags = tyro.cli(ScoreFlags, args=argv, prog="leapalign score")
    rows = _score(flags)
    answer(rows, flags.json, score_table(rows))


def _score(flags: ScoreFlags) -> list[Row]:
    """Return one row per image, in the given order; None for a generated text without a number."""
    from leapalign.distributed.process_group import resolve_device

    configs = {word: reward_config(word) for word in flags.reward}
    prompts = _prompts(flags)
    for path in flags.images:
        check_image(path)
    device = resolve_device(flags.device)
    rows: list[Row] = [{"image": str(i), "prompt": p, "scores": {}} for i, p in zip(flags.images, prompts)]
    for word, config in configs.items():
        reward = load_reward(config, device, flags.dtype)
        tell_longer({word: reward}, prompts)
        for start in range(0, len(rows), flags.batch_size):
            batch = slice(start, start + flags.batch_size)
            images = [read_image(path) for path in flags.images[batch]]
            for row, value in zip(rows[batch], _scores(reward, images, rows[batch])):
                row["scores"][word] = _number(value, word, reward, row)
    return rows


def _scores(reward: Reward, images: Sequence[Image], rows: Sequence[Row]) -> list[float]:
    """Score a batch of images; errors name the file of an image that the reward cannot take."""
    try:
        return reward.score_pil(images, [row["prompt"] for row in rows]).tolist()
    except UnfitImage as error:
        raise UserError(f"{rows[error.index]['image']}: {error.problem}") from None


def _prompts(flags: ScoreFlags) -> list[str]:
    """Return one prompt per image; a single prompt is used for all."""
    if not flags.images:
        raise UserError("score: give image files, as in `leapalign score a.png b.png --reward ... --prompt ...`")
    if not flags.reward:
        raise UserError("score: give at least one --reward; `leapalign list rewards` has them all")
    if flags.batch_size < 1:
        raise UserError(f"score: --batch-size {flags.batch_size}; expected at least 1")
    if bool(flags.prompt) == bool(flags.prompts):
        raise UserError('score: give either --prompt "..." (one for all images, or one per image), or --prompts FILE')
    texts = [check_text(text, "--prompt") for text in flags.prompt]
    texts = texts or [prompt.text for prompt in PromptFile(path=flags.prompts).load()]
    if len(texts) not in (1, len(flags.images)):
        raise UserError(f"score: {len(flags.images)} images and {len(texts)} prompts; give one, or one per image")
    return texts * len(flags.images) if len(texts) == 1 else texts


def _number(value: float, word: str, reward: Reward, row: Row) -> float | None:
    if math.isfinite(value):
        return value
    if not reward.may_fail():
        raise RunStopped(f"{word}: the score of {row['image']} is {value}, for the prompt {row['prompt']!r}")
    return None  # a generated text without a number in it

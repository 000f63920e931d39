"""`leapalign evaluate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import RunInterrupted
from leapalign.lookup.prompts import prompts_of
from leapalign.lookup.recipes import load_plugins
from leapalign.lookup.rewards import reward_config, rewards_of
from leapalign.lookup.sources import Source, find_source
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.report.tables import evaluation_table
from leapalign.rewards.adapt import load_reward, tell_longer
from leapalign.rewards.base import Reward
from leapalign.storage.atomic import disk_errors, write_text

if TYPE_CHECKING:
    from leapalign.evaluation.diversity import Diverse
    from leapalign.evaluation.sampling import Sampling
    from leapalign.evaluation.statistics import Evaluation

SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """GenEval's tasks by a rule-based detector, and rewards, with standard errors."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    against: str = ""
    """A second model, compared over the same prompts and noises."""
    reward: tuple[str, ...] = ()
    """Rewards besides the run's own: NAME, NAME=PATH, NAME=PATH,processor=FOLDER (or other settings of it), or
    file.py:name of your own, which is executed."""
    prompts: str = ""
    """A .txt, .jsonl or .csv file; NAME (leapalign list prompts) or NAME=PATH: its test prompts; empty = shapeworld."""
    per_task: int = 60
    """ShapeWorld test prompts of each task."""
    num: int = 1
    """Images per prompt."""
    diversity: int = 4
    """Further images of each of about 30 prompts, for the mean pairwise distance; 0 = none."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    strength: float = 1.0
    """base + strength (tuned - base) of a run, from 0 to 2: 0 = the base, 1 = as trained; --against stays at 1."""
    batch_size: int = 64
    """Images at a time; changes memory and time only."""
    seed: int = 0
    out: str = ""
    """Folder for the images, from which an interrupted evaluation continues, and for evaluation.json, which `leapalign
    compare` reads; empty = neither is kept."""
    overwrite: bool = False
    """Sample images again that are already in the folder."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the tables as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


def evaluate_command(argv: list[str]) -> None:
    flags = tyro.cli(EvaluateFlags, args=argv, prog="leapalign evaluate")
    found = _evaluate(flags)
    answer(found, flags.json, evaluation_table(found))


def _evaluate(flags: EvaluateFlags) -> dict[str, Any]:
    """Return the evaluation as JSON values; with --against, a comparison in which --against is "before"."""
    from leapalign.distributed.process_group import resolve_device
    from leapalign.evaluation.statistics import compare, report

    prompts = prompts_of(flags.prompts or ShapeWorldPrompts.name, flags.per_task).load()
    plugins = load_plugins(flags.plugin)
    configs = rewards_of(flags.source, plugins) | {word: reward_config(word) for word in flags.reward}
    subjects = [_subject(flags.source, flags.out, prompts, flags, plugins, flags.strength)]
    if flags.against:
        beside = str(Path(flags.out) / "against") if flags.out else ""
        subjects.append(_subject(flags.against, beside, prompts, flags, plugins))
    device = resolve_device(flags.device)
    rewards = {name: load_reward(config, device, flags.dtype) for name, config in configs.items()}
    tell_longer(rewards, [prompt.text for prompt in prompts])
    after, *before = [_draw_and_judge(subject, prompts, rewards, device, flags) for subject in subjects]
    result = compare(before[0], after) if before else report(after)
    for subject, evaluation in zip(subjects, (after, *before)):
        _record(subject, report(evaluation), flags.seed)
    words = {"source": flags.source, "strength": flags.strength, "against": flags.against, "seed": flags.seed}
    return words | result


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model to evaluate, not loaded yet, and the prepared folder for its images."""

    word: str  # as the user named it
    source: Source
    sampling: Sampling
    folder: Path | None  # None: the images are not kept
    diversity: Diverse | None  # None: not measured


def _subject(
    word: str,
    folder: str,
    prompts: Sequence[Prompt],
    flags: EvaluateFlags,
    plugins: dict[str, ModuleType],
    strength: float = 1.0,
) -> _Subject:
    from leapalign.evaluation.diversity import diverse
    from leapalign.evaluation.evaluate import DIVERSITY
    from leapalign.evaluation.image_folder import image_paths
    from leapalign.evaluation.sampling import Sampling

    source = find_source(word, plugins, strength).changed(guidance_scale=flags.guidance)
    sampling = Sampling(
        num_steps=flags.steps or source.num_steps,
        images_per_prompt=flags.num,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    several = diverse(prompts, images_per_prompt=flags.diversity) if flags.diversity else None
    place = Path(folder) if folder else None
    subject = _Subject(word=word, source=source, sampling=sampling, folder=place, diversity=several)
    if subject.folder:
        paths = image_paths(subject.folder, len(prompts), flags.num)
        if kept := _prepare(subject, subject.folder, prompts, paths, flags):
            print(f"{folder}: {kept} of {len(paths)} images are there and are kept", file=sys.stderr)
        if several:
            beside = subject.folder / DIVERSITY
            paths = image_paths(beside, len(several.prompts), several.images_per_prompt)
            _prepare(subject, beside, several.prompts, paths, flags)
    return subject


def _prepare(
    subject: _Subject, folder: Path, prompts: Sequence[Prompt], paths: Sequence[Path], flags: EvaluateFlags
) -> int:
    """Prepare a folder for these images of the subject; return how many are there."""
    from leapalign.evaluation.image_folder import begin_or_continue

    settings = subject.sampling.record(prompts) | subject.source.record() | {"dtype": flags.dtype}
    with disk_errors(folder, "give another --out"):
        return begin_or_continue(folder, settings, paths, overwrite=flags.overwrite)


def _draw_and_judge(
    subject: _Subject, prompts: Sequence[Prompt], rewards: dict[str, Reward], device: str, flags: EvaluateFlags
) -> Evaluation:
    from leapalign.evaluation.evaluate import evaluate
    from leapalign.lookup.detectors import find_detector
    from leapalign.models.pipeline import tell_longer_prompts

    model = subject.source.load(device, flags.dtype)
    tell_longer_prompts(model, [prompt.text for prompt in prompts])
    detector = find_detector(prompts, subject.source.model.height, subject.source.model.width)
    try:
        with disk_errors(subject.folder or Path(gettempdir()), "give another --out, or TMPDIR where there is none"):
            return evaluate(
                model,
                prompts,
                sampling=subject.sampling,
                rewards=rewards,
                detector=detector,
                diversity=subject.diversity,
                folder=subject.folder,
                on_batch=_progress(len(prompts) * flags.num),
            )
    except KeyboardInterrupt:
        if not subject.folder:
            raise
        kept = f"interrupted; the images in {subject.folder} are kept, and the same command continues"
        raise RunInterrupted(kept, 130) from None


def _record(subject: _Subject, found: dict[str, Any], seed: int) -> None:
    """Write one model's numbers beside its images, for `leapalign compare`."""
    if subject.folder:
        from leapalign.evaluation.statistics import EVALUATION_FILE

        words = {"source": subject.word, "strength": subject.source.strength, "seed": seed}
        with disk_errors(subject.folder, "give another --out"):
            write_text(subject.folder / EVALUATION_FILE, json.dumps(words | found, indent=2) + "\n")


def _progress(num: int) -> Callable[[int], None]:
    """Print the number of finished images on stderr, every ten seconds."""
    told = time.monotonic()

    def on_batch(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS:
            told = time.monotonic()
            print(f"{done} of {num} images are drawn", file=sys.stderr, flush=True)

    return on_batch

"""`leapalign evaluate`: GenEval's tasks and rewards of a run, a pipeline folder or an embedded model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leapalign.codec import suggestion
from leapalign.distributed.world import resolve_device
from leapalign.errors import UserError
from leapalign.evaluation.evaluate import Detector, Evaluation, Scorers, compare, evaluate, report
from leapalign.evaluation.image_folder import picture_paths, refuse_existing, write_pictures
from leapalign.evaluation.sampling import Sampling
from leapalign.geneval.rules import check_metadata
from leapalign.lookup.catalog import listing
from leapalign.lookup.recipes import load_plugins, read_run
from leapalign.prompts import Prompt, PromptFile, Prompts, ShapeWorldPrompts
from leapalign.sampling import Source, find_source
from leapalign.scoring import reward_config
from leapalign.storage.atomic import disk_errors
from leapalign.training.engine import reward_names

if TYPE_CHECKING:
    from leapalign.cli.evaluate import EvaluateFlags


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, not yet loaded."""

    source: Source
    num_steps: int
    rewards: dict[str, Any]  # name -> a dataclass of leapalign.rewards


def evaluate_source(flags: EvaluateFlags) -> dict[str, Any]:
    """The evaluation as JSON values; with `against`, a comparison in which `against` is before."""
    prompts = _read_prompts(flags)
    if flags.out:
        refuse_existing(picture_paths(Path(flags.out), len(prompts), flags.num), flags.overwrite)
    plugins = load_plugins(flags.plugin)
    tuned = _subject(flags.source, flags, plugins)
    base = replace(_subject(flags.against, flags, plugins), rewards=tuned.rewards) if flags.against else None
    after = _evaluate(tuned, prompts, flags)
    if flags.out:
        with disk_errors(Path(flags.out), "give another --out"):
            write_pictures(Path(flags.out), prompts, after.images, per_prompt=flags.num, overwrite=flags.overwrite)
    answer = compare(_evaluate(base, prompts, flags), after) if base else report(after)
    return {"source": flags.source, "against": flags.against, "seed": flags.seed} | answer


def as_text(answer: dict[str, Any]) -> str:
    """The table for a terminal; a line a task and reward."""
    rows = answer.get("geneval", {}) | answer["rewards"]
    return "\n".join(
        [f"{answer['images']} pictures, ± one standard error", *(_line(n, row) for n, row in rows.items())]
    )


def _line(name: str, row: dict[str, Any]) -> str:
    if "difference" not in row:
        value = row["accuracy"] if "accuracy" in row else row["mean"]
        failures = f"   without a number: {row['failures']}" if row.get("failures") else ""
        return f"  {name:18}{value:.3f} ± {row['standard_error']:.3f}{failures}"
    cells = [f"{row[key]:.3f} ± {row[f'{key}_standard_error']:.3f}" for key in ("before", "after", "difference")]
    return f"  {name:18}{cells[0]}  →  {cells[1]}   change {cells[2]}"


def _read_prompts(flags: EvaluateFlags) -> list[Prompt]:
    return prompts_of(flags.prompts or ShapeWorldPrompts.name, flags.per_task).load()


def prompts_of(word: str, per_task: int) -> Prompts:
    """A file, or the test prompts of NAME (`leapalign list prompts`), or of NAME=PATH, a copy on disk. UserError."""
    name, given, path = word.partition("=")
    known = {cls.name: cls for cls in _prompt_sets()}
    if name not in known:
        if not os.path.exists(word) and (given or not Path(word).suffix):
            raise UserError(
                f"--prompts {word}: there is no prompt set {name!r}{suggestion(name, known)}; give one of "
                f"{', '.join(known)}, or a .txt, .jsonl or .csv file"
            )
        return PromptFile(path=word)
    takes = {field.name for field in fields(known[name])}
    if given and ("path" not in takes or not path):
        raise UserError(f"--prompts {word}: " + (f"{name} is read from no file" if path else "a path is missing"))
    settings = {"split": "test", "path": path} | ({"num": per_task} if name == ShapeWorldPrompts.name else {})
    return known[name](**{key: value for key, value in settings.items() if key in takes})


def _prompt_sets() -> Iterator[Any]:
    """All sources of prompts but files."""
    for entry in listing(("prompts",))["prompts"]:
        module, _, cls = entry["type"].rpartition(".")
        if entry["name"] != PromptFile.name:
            yield getattr(importlib.import_module(module), cls)


def _subject(source: str, flags: EvaluateFlags, plugins: dict[str, ModuleType]) -> Subject:
    """The model behind a word, and the rewards that belong to it."""
    found = find_source(source, plugins)
    if flags.guidance >= 0:
        found = replace(found, model=replace(found.model, guidance_scale=flags.guidance))
    more = {word: reward_config(word) for word in flags.reward}
    return Subject(source=found, num_steps=flags.steps or found.num_steps, rewards=_rewards(source, plugins) | more)


def _rewards(source: str, plugins: dict[str, ModuleType]) -> dict[str, Any]:
    """The run's own; for the embedded world its reward and the held-out judge."""
    from leapalign.rewards.clip import PickScore

    path, own = Path(source) / "run.json", {}
    if path.is_file():
        run = read_run(path, plugins)
        own = dict(zip(reward_names(run), (term.reward for term in run.rewards)))
    elif source.startswith("embedded:"):
        own = {"pickscore": PickScore(path="embedded:reward")}
    if any(getattr(reward, "path", "").startswith("embedded:") for reward in own.values()):
        own |= {"held_out_reward": PickScore(path="embedded:judge")}
    return own


def _evaluate(each: Subject, prompts: Sequence[Prompt], flags: EvaluateFlags) -> Evaluation:
    device = resolve_device(flags.device)
    rewards: Scorers = {name: reward.load(device, flags.dtype) for name, reward in each.rewards.items()}
    sampling = Sampling(
        num_steps=each.num_steps, images_per_prompt=flags.num, batch_size=flags.batch_size, seed=flags.seed
    )
    model, detector = each.source.load(device, flags.dtype), _detector(prompts, each.source.model)
    return evaluate(model, prompts, sampling=sampling, rewards=rewards, detector=detector)


def _detector(prompts: Sequence[Prompt], model: Any) -> Detector | None:
    """ShapeWorld's detector where all prompts speak of its shapes and the pictures have its size; else none."""
    from leapalign.shapeworld.world import SHAPES, SIZE

    records = [prompt.metadata or {} for prompt in prompts]
    if not all("tag" in record and "include" in record for record in records):
        return None
    for record in records:
        check_metadata(record)
    named = {claim["class"] for record in records for claim in record["include"]}
    if not named <= set(SHAPES) or (model.height, model.width) != (SIZE, SIZE):
        return None
    from leapalign.shapeworld.detector import detect

    return detect

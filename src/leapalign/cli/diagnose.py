"""`leapalign diagnose swap` and `leapalign diagnose exchange`: what sampling steps do, without training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.codec import suggestion
from leapalign.errors import UserError
from leapalign.lookup.pairs import pairs_of
from leapalign.lookup.prompts import prompts_of
from leapalign.lookup.recipes import load_plugins
from leapalign.lookup.rewards import reward_config, rewards_of
from leapalign.lookup.sources import Source, find_source, find_tuned
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.prompts.base import spread
from leapalign.report.step_tables import (
    draw_panels,
    draw_sheet,
    exchange_panels,
    exchange_table,
    swap_panels,
    swap_table,
)
from leapalign.storage.atomic import disk_errors, write_text
from leapalign.storage.lock import is_empty

if TYPE_CHECKING:
    from leapalign.evaluation.evaluate import Detector
    from leapalign.evaluation.image_folder import ImageFiles
    from leapalign.evaluation.sampling import Sampling
    from leapalign.report.step_tables import Panel
    from leapalign.rewards.base import Reward

SECONDS = 10.0  # between two lines of progress
ROWS = 8  # prompts on the sheet of images
USAGE = """usage: leapalign diagnose KIND ...

  swap WHAT      which sampling steps decide what an image shows: another prompt is swapped in at a step
  exchange RUN   in which steps a run's gain sits: tuned weights in some steps, the base's in the others

  leapalign diagnose KIND --help lists the flags; neither trains
"""


@dataclass(frozen=True, kw_only=True)
class DiagnoseFlags:
    """Flags that both kinds have."""

    reward: tuple[str, ...] = ()
    """Rewards besides the run's own, as in `evaluate`."""
    prompts: str = ""
    """A .txt, .jsonl or .csv file; NAME (leapalign list prompts) or NAME=PATH: its test prompts; empty = shapeworld."""
    per_task: int = 40
    """ShapeWorld test prompts of each task."""
    num: int = 1
    """Images per prompt."""
    steps: int = 0
    """Sampling steps T; 0 = as in the run's training, or 25."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    batch_size: int = 64
    """Images at a time; changes memory and time only."""
    seed: int = 0
    out: str = ""
    """A new folder for numbers.json, figure.png and images.png; empty = none is written."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the numbers as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


@dataclass(frozen=True, kw_only=True)
class SwapFlags(DiagnoseFlags):
    """Sample with one prompt, swap in another at a step, and measure which of the two the image obeys."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, a hub id, or embedded:generator."""
    at: tuple[int, ...] = ()
    """Steps at which the second prompt is swapped in, T (the noisiest) to 1; empty = all, or ten of many."""
    pair: tuple[tuple[str, str], ...] = ()
    """Your own pairs instead of --prompts: FIRST SECOND [FIRST SECOND ...]."""


@dataclass(frozen=True, kw_only=True)
class ExchangeFlags(DiagnoseFlags):
    """Sample with a run's tuned weights in some steps and its base's in the others, and evaluate against the base."""

    source: Annotated[str, tyro.conf.Positional]
    """The folder of a finished run, with all weights tuned or a LoRA."""
    ranges: tuple[str, ...] = ()
    """Steps such as 5-8 (T is the noisiest, 1 the last), both included; empty = 1-s for every s, or ten of many."""


def diagnose_command(argv: list[str]) -> None:
    kinds: dict[str, Callable[[list[str]], None]] = {"swap": _swap_command, "exchange": _exchange_command}
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    if not argv or argv[0] not in kinds:
        came = f"unknown kind {argv[0]!r}{suggestion(argv[0], kinds)}" if argv else "give a kind"
        raise UserError(f"diagnose: {came}\n\n{USAGE}")
    kinds[argv[0]](argv[1:])


def _swap_command(argv: list[str]) -> None:
    flags = tyro.cli(SwapFlags, args=argv, prog="leapalign diagnose swap")
    found = _swap(flags)
    answer(found, flags.json, swap_table(found))


def _exchange_command(argv: list[str]) -> None:
    flags = tyro.cli(ExchangeFlags, args=argv, prog="leapalign diagnose exchange")
    found = _exchange(flags)
    answer(found, flags.json, exchange_table(found))


def _swap(flags: SwapFlags) -> dict[str, Any]:
    from leapalign.evaluation.swap import swap_test

    _check_out(flags.out)
    plugins = load_plugins(flags.plugin)
    source = find_source(flags.source, plugins).changed(guidance_scale=flags.guidance)
    pairs = pairs_of(flags.pair, flags.prompts, flags.per_task)
    setting = _setting(flags, source, [prompt for pair in pairs for prompt in pair], plugins)
    for t in flags.at:
        if not 0 <= t <= setting.sampling.num_steps:
            raise UserError(f"--at {t}: expected a step from {setting.sampling.num_steps} (the noisiest) to 0 (never)")
    model = source.load(setting.device, flags.dtype)
    with _temporary():
        found = swap_test(model, pairs, at=flags.at, on_batch=_progress(), **setting.measures())
    numbers = {"source": flags.source, "seed": flags.seed} | found.numbers
    texts = {"pairs": [[first.text, second.text] for first, second in pairs]}
    _write(flags.out, numbers | texts, swap_panels(numbers), found.images)
    return numbers


def _exchange(flags: ExchangeFlags) -> dict[str, Any]:
    from leapalign.evaluation.exchange import exchange_by_step
    from leapalign.flow.schedules import within

    _check_out(flags.out)
    plugins = load_plugins(flags.plugin)
    source = find_tuned(flags.source, plugins).changed(guidance_scale=flags.guidance)
    prompts = prompts_of(flags.prompts or ShapeWorldPrompts.name, flags.per_task).load()
    setting = _setting(flags, source, prompts, plugins)
    ranges = [_range(word) for word in flags.ranges]
    for first, last in ranges:
        within(first, last, setting.sampling.num_steps)
    ends = source.load_with_base(setting.device, flags.dtype)
    with _temporary():
        found = exchange_by_step(ends, prompts, ranges=ranges, on_batch=_progress(), **setting.measures())
    numbers = {"source": flags.source, "seed": flags.seed} | found.numbers
    columns = {"columns": found.names, "prompts": [prompt.text for prompt in prompts]}
    _write(flags.out, numbers | columns, exchange_panels(numbers), found.images)
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """How images are sampled and measured."""

    device: str
    sampling: Sampling
    rewards: dict[str, Reward]
    detector: Detector | None

    def measures(self) -> dict[str, Any]:
        return {"sampling": self.sampling, "rewards": self.rewards, "detector": self.detector}


def _setting(
    flags: SwapFlags | ExchangeFlags, source: Source, prompts: Sequence[Prompt], plugins: dict[str, ModuleType]
) -> _Setting:
    """Check the settings and load the rewards. Raises UserError if nothing would be measured."""
    from leapalign.distributed.process_group import resolve_device
    from leapalign.evaluation.sampling import Sampling
    from leapalign.lookup.detectors import find_detector
    from leapalign.rewards.adapt import load_reward, tell_longer

    sampling = Sampling(
        num_steps=flags.steps or source.num_steps,
        images_per_prompt=flags.num,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    device = resolve_device(flags.device)
    detector = find_detector(prompts, source.model.height, source.model.width)
    configs = rewards_of(flags.source, plugins) | {word: reward_config(word) for word in flags.reward}
    if not configs and detector is None:
        raise UserError(f"diagnose: nothing measures the images of {flags.source}; give a --reward that reads prompts")
    rewards = {name: load_reward(config, device, flags.dtype) for name, config in configs.items()}
    tell_longer(rewards, [prompt.text for prompt in prompts])
    return _Setting(device=device, sampling=sampling, rewards=rewards, detector=detector)


def _range(word: str) -> tuple[int, int]:
    """Parse FIRST-LAST."""
    first, dash, last = word.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise UserError(f"--ranges {word}: expected two steps such as 5-8")
    return int(first), int(last)


def _check_out(out: str) -> None:
    if out and not is_empty(Path(out)):
        raise UserError(f"{out}: this folder is not empty; give another --out")


def _temporary() -> AbstractContextManager[None]:
    return disk_errors(Path(gettempdir()), "give another place for temporary files, TMPDIR")


def _write(out: str, numbers: Mapping[str, Any], panels: Sequence[Panel], columns: Sequence[ImageFiles]) -> None:
    """Write numbers, figure and some images (one row a prompt, one column a step or range) into the folder."""
    if not out:
        return
    folder = Path(out)
    with disk_errors(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "numbers.json", json.dumps(numbers, indent=2) + "\n")
        draw_panels(panels, folder / "figure.png")
        draw_sheet(columns, spread(range(len(columns[0])), ROWS), folder / "images.png")


def _progress() -> Callable[[int], None]:
    """Print the number of finished images on stderr, every ten seconds."""
    told = time.monotonic()

    def on_batch(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS:
            told = time.monotonic()
            print(f"{done} images are drawn", file=sys.stderr, flush=True)

    return on_batch

"""`leapalign verify`: whether the weights of a model or a reward are as they should be, and what to expect of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.distributed.world import resolve_device
from leapalign.lookup.recipes import load_plugins
from leapalign.models.base import pointed_at
from leapalign.sampling import find_source
from leapalign.scoring import reward_classes, reward_config
from leapalign.verification.checks import Check, note
from leapalign.verification.files import read_hashes
from leapalign.verification.pipelines import Trial, check_pipeline
from leapalign.verification.rewards import check_reward

if TYPE_CHECKING:
    from leapalign.cli.verify import VerifyFlags

MARKS = {"good": "[green]ok[/]", "different": "[bold red]DIFFERS[/]", "note": "[dim]note[/]"}


def verify(flags: VerifyFlags) -> dict[str, Any]:
    """{"source", "kind", "good", "checks"}. Raises UserError where there is nothing to look at."""
    listed = read_hashes(flags.hashes) if flags.hashes else None
    device = resolve_device(flags.device)
    if is_reward(flags.source):
        kind, checks = "reward", check_reward(flags.source, reward_config(flags.source), device, flags.dtype, listed)
    else:
        source = find_source(flags.source, load_plugins(flags.plugin))
        whole = source.tuning.output == "pipeline"
        config = pointed_at(source.model, source.saved) if whole else source.model
        own = (
            config.height if (Path(flags.source) / "run.json").is_file() or flags.source.startswith("embedded:") else 0
        )
        trial = Trial(
            prompt=flags.prompt, num_steps=flags.steps, size=flags.size or own, seed=flags.seed, device=device
        )
        kind, checks = "pipeline", check_pipeline(config, trial, listed)
        if not whole:
            told = f"{source.tuning.name} in {source.saved}: what is checked here is its base, {config.path}"
            checks.append(note("run", "adapter", told, "`leapalign export` merges both into a pipeline to verify"))
    good = all(check.state != "different" for check in checks)
    return {"source": flags.source, "kind": kind, "good": good, "checks": [dataclasses.asdict(c) for c in checks]}


def is_reward(word: str) -> bool:
    """NAME, NAME=PATH or file.py:name; whatever else is a model."""
    return ".py:" in word or word.partition("=")[0] in reward_classes()


def print_table(answer: dict[str, Any]) -> None:
    """A line a check, then the verdict."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{answer['kind']} {answer['source']}"
    table = Table("", "part", "check", "came", "expected", "what to do", title=title, box=SIMPLE)
    for check in (Check(**record) for record in answer["checks"]):
        cells = (check.part, check.check, check.came, check.expected, check.remedy)
        table.add_row(MARKS[check.state], *(escape(cell) for cell in cells))
    console = Console() if sys.stdout.isatty() else Console(width=160)  # a log has no edge
    console.print(table)
    console.print(verdict([Check(**record) for record in answer["checks"]]))


def verdict(checks: Sequence[Check]) -> str:
    count = {state: sum(check.state == state for check in checks) for state in ("good", "different", "note")}
    word = "good" if not count["different"] else "NOT as it should be"
    return f"{word}: {count['good']} checks agree, {count['different']} differ, {count['note']} notes"

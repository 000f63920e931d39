"""`leapalign train` and `leapalign resume`: the recipe or run, its flags, and the printed result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from leapalign.cli.answer import answer
from leapalign.errors import UserError

if TYPE_CHECKING:
    from leapalign.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a recipe in a new folder; each of its settings is a flag."""

    run: Annotated[Any, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print what the run would need (memory, downloads, disk) or what is wrong with it; fetch and load nothing."""
    ranks: int = 1
    """Number of ranks to plan for, each with its own GPU (--dry-run only)."""
    ranks_per_machine: int = 8
    """Ranks per node (--dry-run only)."""
    json: bool = False
    """Print the run's summary, or the plan, as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes a run.json uses; each is executed."""


def train_command(argv: list[str]) -> None:
    from leapalign.lookup.recipes import load_recipe, plugins_in

    word, rest = _split_recipe(argv)
    rest = [_with_new_name(flag) for flag in rest]
    recipe = load_recipe(word, plugins_in(rest))
    flags = tyro.cli(TrainFlags, default=TrainFlags(run=recipe), args=rest, prog=f"leapalign train {word}")
    if flags.dry_run:
        _plan(flags)
    elif flags.ranks != 1:
        raise UserError(
            f"--ranks {flags.ranks} plans a run (--dry-run); to train on several ranks, "
            f"`torchrun --nproc-per-node {flags.ranks} -m leapalign train {word} ...`"
        )
    else:
        _run(flags.run, as_json=flags.json)


def _with_new_name(word: str) -> str:
    """Replace flags by their former names (--probe-every or --probe-every=5) with the present ones."""
    from leapalign.run import Run

    flag, equals, value = word.partition("=")
    new = Run.renamed_fields.get(flag.removeprefix("--").replace("-", "_"), "")
    return f"--{new.replace('_', '-')}{equals}{value}" if new and flag.startswith("--") else word


def _plan(flags: TrainFlags) -> None:
    from leapalign.planning.plan import make_plan
    from leapalign.planning.show import as_text

    plan = make_plan(flags.run, flags.ranks, flags.ranks_per_machine)
    answer(plan.as_json(), flags.json, as_text(plan))


def _split_recipe(argv: list[str]) -> tuple[str, list[str]]:
    """Read RECIPE, which comes first because it determines the flags."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "--help" in argv or "-h" in argv:
        print("RECIPE comes first; these are the flags of shapeworld-leapalign:\n")
        return "shapeworld-leapalign", argv
    raise UserError("train: give the recipe first, as in `leapalign train shapeworld-leapalign --steps 20`")


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """Continue a run, bit for bit as if it had not been interrupted (on the CPU)."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    steps: int = 0
    """Train up to this step instead of the recorded one; 0 = as recorded."""
    max_hours: float = -1.0
    """Stop in time to save, with exit status 75; 0 = no limit, -1 = as recorded."""
    checkpoint: str = ""
    """Checkpoint to continue from, e.g. step-000050; empty = the newest. Later ones are kept under other names."""
    allow_changes: bool = False
    """Continue although settings or inputs differ from those that wrote the checkpoint."""
    stop_when: bool = True
    """--no-stop-when: train on although the run's stop_when ended it, and export the last weights."""
    json: bool = False
    """Print the run's summary as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


def resume_command(argv: list[str]) -> None:
    from leapalign.lookup.recipes import load_plugins, read_run
    from leapalign.lookup.runs import check_run_folder
    from leapalign.monitors import NEVER

    flags = tyro.cli(ResumeFlags, args=argv, prog="leapalign resume")
    check_run_folder(flags.run, "resume")
    run = read_run(flags.run / "run.json", load_plugins(flags.plugin))
    hours = flags.max_hours if flags.max_hours >= 0 else run.max_hours
    rule = run.stop_when if flags.stop_when else NEVER
    run = replace(run, out=str(flags.run), steps=flags.steps or run.steps, max_hours=hours, stop_when=rule)
    _run(run, as_json=flags.json, resume=True, checkpoint=flags.checkpoint, allow_changes=flags.allow_changes)


def _run(run: Run, *, as_json: bool, **how: Any) -> None:
    from leapalign.training.loop import train

    summary = train(run, **how).summary
    if not summary:  # rank 0 of several has it
        return
    which = f" (step {summary['exported']['step']}: {summary['exported']['why']})" if run.stop_when.evaluations else ""
    text = f"{summary['steps']} steps in {summary['seconds']:.0f} s; tuned: {summary[run.tuning.output]}{which}"
    answer(summary, as_json, text)

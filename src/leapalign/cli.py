"""The command line. Exit status: 0 done, 1 stopped (NaN, infinity, out of memory) or `verify`
found differences, 2 the user's mistake.

A training run that was asked to stop has saved itself: 130 after SIGINT (Ctrl-C), 143 after SIGTERM, 75 when its
`max_hours` are over. 130 is also any other command that was interrupted, and a second Ctrl-C.

Flags come from the recipe's own dataclasses. Help imports no torch: the work is imported when it starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.codec import suggestion
from leapalign.errors import RunInterrupted, RunStopped, UserError, is_out_of_memory, readable, reason

if TYPE_CHECKING:
    from leapalign.run import Run

USAGE = """usage: leapalign COMMAND ...

  train RECIPE [--flags]   train; RECIPE is a name (leapalign list recipes), file.py:name, or a run.json
                           with --dry-run: memory, downloads and disk that it would need, and nothing else
  resume RUN               go on with an interrupted run, from its last checkpoint
  sample WHAT              pictures from a run, a pipeline folder or an embedded model
  evaluate WHAT            GenEval tasks and rewards of a run or a pipeline folder
  score IMAGES             rewards of picture files
  export RUN               a run's weights for other programs: pipeline, LoRA file, ComfyUI
  verify WHAT              whether a model's or a reward's files are good, and what to expect of it
  cache                    the prompts encoded on disk: how many, and --clear
  list [KIND]              methods, models, rewards, prompt sets, ways of tuning or recipes
  demo                     the whole way once, on a laptop CPU

  leapalign COMMAND --help says more; leapalign train RECIPE --help lists that recipe's flags
"""


def entry_point() -> None:
    """What the installed command calls."""
    if not sys.stderr.isatty():  # a log wants no bars of transformers and the hub
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command and return the exit status; no traceback for a user's mistake."""
    try:
        return _dispatch(list(argv))
    except SystemExit as end:  # tyro: 0 after help, 2 after a wrong flag
        return end.code if isinstance(end.code, int) else 2
    except UserError as error:
        _say(error, f"leapalign: {error}")
        return 2
    except RunStopped as error:
        _say(error, f"leapalign: stopped at {error}")
        return 1
    except RunInterrupted as end:
        _say(end, f"leapalign: {end}")
        return end.status
    except (MemoryError, RuntimeError) as error:  # of commands that do not train: a run says more (memory_errors.py)
        if not is_out_of_memory(error):
            raise
        _say(
            RunStopped(),
            f"leapalign: stopped: out of memory ({reason(error)}); use fewer or smaller pictures at a time",
        )
        return 1
    except BrokenPipeError:  # `leapalign ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush finds no pipe either
        return 1
    except KeyboardInterrupt:
        print("leapalign: interrupted; `leapalign resume RUN` goes on from the last checkpoint", file=sys.stderr)
        return 130


def _say(error: UserError | RunStopped | RunInterrupted, text: str) -> None:
    """Once, and not once a rank."""
    if not error.elsewhere:
        print(readable(text), file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    if odd := [word for word in argv if "\0" in word]:  # from a program: no shell can pass it
        raise UserError(f"{odd[0]!r} has a NUL character, which no name on a disk can have; leave it out")
    if not argv:
        raise UserError(f"give a command\n\n{USAGE}")
    if argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"leapalign {version('leapalign')}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"there is no command {argv[0]!r}{suggestion(argv[0], COMMANDS)}\n\n{USAGE}")
    return COMMANDS[argv[0]](argv[1:]) or 0


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a recipe into a new folder; every number of it is a flag."""

    run: Annotated[Any, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print what the run would need (memory, downloads, disk) or what is wrong with it; fetch and load nothing."""
    json: bool = False
    """Print the run's summary, or the plan, as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes a run.json names; each is executed."""


def _train(argv: list[str]) -> None:
    from leapalign.recipe_files import load_recipe, plugins_in

    word, rest = _split_recipe(argv)
    recipe = load_recipe(word, plugins_in(rest))
    flags = tyro.cli(TrainFlags, default=TrainFlags(run=recipe), args=rest, prog=f"leapalign train {word}")
    if flags.dry_run:
        _plan(flags.run, flags.json)
    else:
        _run(flags.run, as_json=flags.json)


def _plan(run: Run, as_json: bool) -> None:
    from leapalign.planning.plan import make_plan
    from leapalign.planning.show import as_text

    plan = make_plan(run)
    _answer(plan.as_json(), as_json, as_text(plan))


def _split_recipe(argv: list[str]) -> tuple[str, list[str]]:
    """RECIPE comes first, because it decides which flags there are."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "--help" in argv or "-h" in argv:
        print("RECIPE comes first; these are the flags of shapeworld-leapalign:\n")
        return "shapeworld-leapalign", argv
    raise UserError("train: give the recipe first, as in `leapalign train shapeworld-leapalign --steps 20`")


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """Go on with a run, bit for bit as if it had not been interrupted (on the CPU)."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    steps: int = 0
    """Train up to this step instead of the recorded one; 0 = as recorded."""
    max_hours: float = -1.0
    """Stop in time to save, with exit status 75; 0 = no limit, -1 = as recorded."""
    checkpoint: str = ""
    """Go on from this one, as step-000050; empty = the newest. Later ones are kept under other names."""
    allow_changes: bool = False
    """Go on although run.json differs from what the checkpoint was trained with."""
    json: bool = False
    """Print the run's summary as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def _resume(argv: list[str]) -> None:
    from leapalign.recipe_files import load_plugins, read_run

    flags = tyro.cli(ResumeFlags, args=argv, prog="leapalign resume")
    run = read_run(flags.run / "run.json", load_plugins(flags.plugin))
    hours = flags.max_hours if flags.max_hours >= 0 else run.max_hours
    run = replace(run, out=str(flags.run), steps=flags.steps or run.steps, max_hours=hours)
    _run(run, as_json=flags.json, resume=True, checkpoint=flags.checkpoint, allow_changes=flags.allow_changes)


def _run(run: Run, *, as_json: bool, **how: Any) -> None:
    from leapalign.training.loop import train

    summary = train(run, **how).summary
    if not summary:  # rank 0 of several has it
        return
    _answer(
        summary, as_json, f"{summary['steps']} steps in {summary['seconds']:.0f} s; tuned: {summary[run.tuning.output]}"
    )


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """Draw pictures with a run's tuned weights, a pipeline folder, or embedded:generator."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    prompt: tuple[str, ...]
    """What to draw; several texts give several pictures."""
    out: Path = Path("samples")
    """Where the PNG files go."""
    overwrite: bool = False
    """Replace pictures that are there."""
    num: int = 1
    """Pictures a prompt."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    size: int = 0
    """Height and width in pixels; 0 = as in the run, or the family's usual size."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the pictures' paths as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def _sample(argv: list[str]) -> None:
    flags = tyro.cli(SampleFlags, args=argv, prog="leapalign sample")
    from leapalign.sampling import sample

    pictures = sample(flags)
    _answer(pictures, flags.json, "\n".join(picture["path"] for picture in pictures))


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """GenEval's tasks by a rule-based detector, and rewards, with standard errors."""

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, a diffusers pipeline folder, or embedded:generator."""
    against: str = ""
    """A second model, compared over the same prompts and noises."""
    reward: tuple[str, ...] = ()
    """More rewards than the run's own: NAME, NAME=PATH, or file.py:name of your own, which is executed."""
    prompts: str = ""
    """A .txt, .jsonl or .csv file; empty = ShapeWorld's test prompts. GenEval needs .jsonl with its metadata."""
    per_task: int = 60
    """ShapeWorld test prompts of each task."""
    num: int = 1
    """Pictures a prompt."""
    steps: int = 0
    """Sampling steps; 0 = as in the run's training, or 25."""
    guidance: float = -1.0
    """Guidance scale; -1 = as in the run, or the family's usual scale."""
    batch_size: int = 64
    """Pictures at a time; changes memory and time only."""
    seed: int = 0
    out: str = ""
    """A folder for the pictures; empty = keep none."""
    overwrite: bool = False
    """Replace pictures that are there."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False
    """Print the tables as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def _evaluate(argv: list[str]) -> None:
    flags = tyro.cli(EvaluateFlags, args=argv, prog="leapalign evaluate")
    from leapalign.evaluating import as_text, evaluate_source

    answer = evaluate_source(flags)
    _answer(answer, flags.json, as_text(answer))


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Rewards of picture files, preprocessed by Pillow as the published packages do."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Picture files."""
    reward: tuple[str, ...]
    """NAME (leapalign list rewards), NAME=PATH for other weights, or file.py:name of your own, which is executed."""
    prompt: tuple[str, ...] = ()
    """What the pictures should show: one text for all, or one an image."""
    prompts: str = ""
    """Instead: a .txt, .jsonl or .csv file with a prompt an image."""
    batch_size: int = 8
    """Pictures at a time; changes memory and time only."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the reward's weights."""
    json: bool = False
    """Print a row a picture as JSON on stdout."""


def _score(argv: list[str]) -> None:
    flags = tyro.cli(ScoreFlags, args=argv, prog="leapalign score")
    from leapalign.scoring import as_text, score_files

    rows = score_files(flags)
    _answer(rows, flags.json, as_text(rows))


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """A finished run's weights for other programs, in a new folder."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str
    """A new folder."""
    format: Literal["pipeline", "lora", "comfyui"] = "pipeline"
    """A whole diffusers folder (an adapter is merged), a diffusers LoRA file, or one with ComfyUI's names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer or the adapter; bfloat16 halves it and rounds each weight."""
    json: bool = False
    """Print what was written as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def _export(argv: list[str]) -> None:
    flags = tyro.cli(ExportFlags, args=argv, prog="leapalign export")
    from leapalign.exporting import as_text, export_run

    answer = export_run(flags)
    _answer(answer, flags.json, as_text(answer))


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """Whether weights are what they should be: files, keys, hashes, our sampler against the pipeline's own, scores."""

    source: Annotated[str, tyro.conf.Positional]
    """A pipeline folder, hub id, run or embedded:generator; or a reward: NAME (leapalign list rewards), NAME=PATH."""
    hashes: str = ""
    """A list as sha256sum writes it, with paths below the folder; empty = the hub's own, where its cache has them."""
    prompt: str = "a photo of a red circle"
    """What both samplers draw."""
    steps: int = 4
    """Sampling steps of that picture."""
    size: int = 0
    """Its height and width in pixels; 0 = the run's, or the pipeline's usual size up to 512."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a reward's weights; pipelines are compared in float32."""
    json: bool = False
    """Print every check as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def _verify(argv: list[str]) -> int:
    flags = tyro.cli(VerifyFlags, args=argv, prog="leapalign verify")
    from leapalign.verifying import print_table, verify

    answer = verify(flags)
    if flags.json:
        _answer(answer, True, "")
    else:
        print_table(answer)
    return 0 if answer["good"] else 1


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """The prompts that text encoders have encoded, kept on disk (LEAPALIGN_CACHE, LEAPALIGN_CACHE_GB)."""

    clear: bool = False
    """Remove all of them; the next run encodes its prompts again."""
    json: bool = False
    """Print JSON on stdout."""


def _cache(argv: list[str]) -> None:
    flags = tyro.cli(CacheFlags, args=argv, prog="leapalign cache")
    from leapalign.caching import as_text, show

    answer = show(clear=flags.clear)
    _answer(answer, flags.json, as_text(answer))


@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """What there is to choose from, with the class that a run.json names."""

    kind: Annotated[
        Literal["all", "methods", "models", "rewards", "prompts", "tuning", "recipes"], tyro.conf.Positional
    ] = "all"
    json: bool = False
    """Print JSON on stdout."""


def _list(argv: list[str]) -> None:
    flags = tyro.cli(ListFlags, args=argv, prog="leapalign list")
    from leapalign.listing import KINDS, listing, rewards_table

    table = listing(KINDS if flags.kind == "all" else (flags.kind,))
    width = 2 + max(len(entry["name"]) for entries in table.values() for entry in entries)
    lines = [f"{kind}\n" + "\n".join(f"  {e['name']:{width}}{e['text']}" for e in table[kind]) for kind in table]
    _answer(table, flags.json, "\n\n".join(lines) if flags.kind != "rewards" else rewards_table(table["rewards"]))


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Evaluate the embedded model, align it with LeapAlign, evaluate it again, and write a page with pictures."""

    out: str = ""
    """The run's folder; empty = runs/demo- and the time."""
    seed: int = 0
    steps: int = 0
    """Updates; 0 = as in the recipe."""
    quick: bool = False
    """A few steps and pictures: to see that everything works, not to see the effect."""
    device: str = "auto"
    json: bool = False
    """Print summary.json on stdout, and the rest on stderr."""


def _demo(argv: list[str]) -> None:
    flags = tyro.cli(DemoFlags, args=argv, prog="leapalign demo")
    from leapalign.demo import main as conduct_demo

    out = Path(flags.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    with redirect_stdout(sys.stderr if flags.json else sys.stdout):
        summary = conduct_demo(out, seed=flags.seed, steps=flags.steps, quick=flags.quick, device=flags.device)
    if flags.json:
        _answer(summary, True, "")


def _answer(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=2) if as_json else text)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "resume": _resume,
    "sample": _sample,
    "evaluate": _evaluate,
    "score": _score,
    "export": _export,
    "verify": _verify,
    "cache": _cache,
    "list": _list,
    "demo": _demo,
}

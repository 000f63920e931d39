"""The command line: one file per command, with its flags. The implementation is imported when a command starts.

Exit status: 0 done, 1 stopped (NaN, infinity, out of memory) or `verify` found differences, 2 a user error.

A training run that was asked to stop saves and exits with 128 + the number of the signal (130 after SIGINT, 143 after
SIGTERM, 129 after SIGHUP), or 75 after `max_hours`. Other interrupted commands exit with 130, and so does a run at a
second Ctrl-C. A terminal or a log reader that goes away ends no run (`streams`).

A recipe's flags come from its own dataclasses. Help imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path

from leapalign.cli.arena import arena_command
from leapalign.cli.cache import cache_command
from leapalign.cli.compare import compare_command
from leapalign.cli.demo import demo_command
from leapalign.cli.diagnose import diagnose_command
from leapalign.cli.evaluate import evaluate_command
from leapalign.cli.export import export_command
from leapalign.cli.listing import list_command
from leapalign.cli.sample import sample_command
from leapalign.cli.score import score_command
from leapalign.cli.streams import prepare_streams
from leapalign.cli.train import resume_command, train_command
from leapalign.cli.verify import verify_command
from leapalign.codec import suggestion
from leapalign.errors import RunInterrupted, RunStopped, UserError, is_out_of_memory, readable, reason
from leapalign.storage.atomic import DISK_PROBLEMS

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and the ends of lines
USAGE = """usage: leapalign COMMAND ...

  train RECIPE [--flags]   train; RECIPE is a name (leapalign list recipes), file.py:name, or a run.json;
                           --dry-run only prints the memory, downloads and disk space that it needs
  resume RUN               continue an interrupted run from its last checkpoint
  sample WHAT              images from a run, a pipeline folder or an embedded model
  evaluate WHAT            GenEval tasks and rewards of a run or a pipeline folder
  diagnose KIND WHAT       which sampling steps decide an image (swap), and in which a run's gain sits (exchange)
  compare RUN RUN ...      one table of runs and stored evaluations; Markdown, CSV, LaTeX, HTML
  arena STUDY              methods and seeds at equal updates and equal compute, in one table and page
  score IMAGES             rewards of image files
  export RUN               a run's weights for other programs: pipeline or LoRA file
  verify WHAT              check the files of a model or a reward, and its output
  cache                    number and size of the prompt embeds on disk; --clear removes them
  list [KIND]              methods, models, rewards, prompt sets, ways of tuning or recipes
  demo                     evaluate, train and evaluate again on a laptop CPU

  leapalign COMMAND --help lists the flags; leapalign train RECIPE --help lists that recipe's flags
"""


def entry_point() -> None:
    """Run the installed command on the process's arguments and streams, and exit."""
    prepare_streams(next(iter(sys.argv[1:]), ""))
    if not sys.stderr.isatty():  # no progress bars of transformers and the hub in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, TextIOWrapper):  # names that the terminal cannot encode must not fail
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _as_message
    sys.exit(main(sys.argv[1:]))


def _as_message(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one message without a place in the code, unless a library raised it."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"leapalign: {readable(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def main(argv: Sequence[str]) -> int:
    """Run one command and return the exit status; user errors print no traceback."""
    try:
        status = _dispatch(list(argv))
        sys.stdout.flush()  # here, where a full disk or a reader that has gone has a message and a status
        return status
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
    except (MemoryError, RuntimeError) as error:  # in commands that do not train; a run prints more (memory_errors.py)
        if not is_out_of_memory(error):
            raise
        stopped = f"out of memory ({reason(error)}); use fewer or smaller images at a time"
        print(readable(f"leapalign: stopped: {stopped}"), file=sys.stderr)
        return 1
    except BrokenPipeError:  # `leapalign ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush must not meet the closed pipe
        return 1
    except OSError as error:  # a name or a place that the system refuses, wherever that was met first
        if error.errno not in DISK_PROBLEMS:
            raise
        print(
            readable(f"leapalign: {error.filename or 'stdout'}: {DISK_PROBLEMS[error.errno]}; give another"),
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        trains = argv and argv[0] in ("train", "resume", "demo")
        remedy = "; `leapalign resume RUN` goes on from the last checkpoint" if trains else ""
        print(f"leapalign: interrupted{remedy}", file=sys.stderr)
        return 130


def _say(error: UserError | RunStopped | RunInterrupted, text: str) -> None:
    """Print an error, unless another rank prints it."""
    if not error.elsewhere:
        print(readable(text), file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    if odd := [word for word in argv if CONTROL.search(word)]:  # a terminal would obey them in every message
        raise UserError(f"{odd[0]!r} contains a control character; remove it")
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
        raise UserError(f"unknown command {argv[0]!r}{suggestion(argv[0], COMMANDS)}\n\n{USAGE}")
    return COMMANDS[argv[0]](argv[1:]) or 0


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train_command,
    "resume": resume_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "diagnose": diagnose_command,
    "compare": compare_command,
    "arena": arena_command,
    "score": score_command,
    "export": export_command,
    "verify": verify_command,
    "cache": cache_command,
    "list": list_command,
    "demo": demo_command,
}

"""One process of a run: saves, stop requests, skipped batches, messages to the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.checkpoint import checkpoints
from leapalign.checkpoint.async_writer import Saver
from leapalign.checkpoint.best import BestWeights
from leapalign.checkpoint.inputs import FILE
from leapalign.checkpoint.sharded import Writers
from leapalign.checkpoint.state import Checkpoint, Progress, versions
from leapalign.errors import NotFinite, RunInterrupted, UserError
from leapalign.run import Run, differences
from leapalign.storage.atomic import refuse_links_out, refuse_other_kinds
from leapalign.storage.lock import HOLDER, LOCK, is_empty
from leapalign.training import learning, self_checks, watch
from leapalign.training.engine import Engine
from leapalign.training.fixed_set import evaluate
from leapalign.training.live_weights import short_average
from leapalign.training.preemption import Stop
from leapalign.training.tracking import LOG, Metrics, Silent, Tracker


@dataclass(frozen=True, kw_only=True)
class Session:
    """The state of a run in one process, from its first step to its last."""

    engine: Engine
    progress: Progress
    tracker: Tracker | Silent
    saver: Saver
    stop: Stop
    writers: Writers | None = None  # None: every rank has whole weights
    inputs: dict[str, Any]  # the run's inputs, for checkpoints
    best: BestWeights

    def evaluate(self) -> Metrics:
        """Evaluate on the fixed set; with `stop_when`, note the numbers, and keep the weights if they are the best."""
        metrics, progress, rule = evaluate(self.engine), self.progress, self.engine.run.stop_when
        if rule.evaluations:
            progress.evaluations.append(watch.watched({"step": progress.step} | metrics, rule))
            if watch.is_best(progress.evaluations, progress.best_step, rule):
                progress.best_step = progress.step
                self.best.keep(progress.step, self.engine.ema.shadow)
        return metrics

    @property
    def between_rollouts(self) -> bool:
        """True if the next update begins with new rollouts: checkpoints hold none."""
        return self.progress.step % self.engine.run.updates_per_rollout == 0

    def stopped(self) -> str:
        """Return why `stop_when` ends the run here, between two rollouts; empty if it does not."""
        return watch.stopped(self.progress.evaluations, self.engine.run.stop_when) if self.between_rollouts else ""

    def save(self) -> None:
        """Save, or start to save; the first save of a process is checked.

        Rank 0 writes; with sharded weights, every rank that holds a first copy writes its shards.
        """
        engine, writers = self.engine, self.writers
        if self.saver.step < 0 and engine.run.self_checks:
            self_checks.at_first_save(engine)
        self.progress.metrics_bytes = self.tracker.position()
        self.progress.grad_norms = list(engine.norms)
        if engine.world.rank in (writers.ranks if writers else (0,)):
            state = (engine.parameters, engine.ema.shadow, engine.optimizer, writers, self.inputs)
            learnt = engine.learner.state() if engine.value_model else {}
            self.saver.save(checkpoints.take(engine.run, self.progress, *state, learnt), self.tracker.sync)
        self.saver.step = self.progress.step
        self.best.in_checkpoint = self.progress.best_step

    def leave_if_asked(self) -> None:
        """Between two steps: on a signal or at the time limit, save (unless just saved) and leave.

        Raises RunInterrupted on leaving.
        """
        reason = self.engine.world.first(self.stop.reason(self.saver.seconds_needed()))
        if reason is None:
            return
        if self.saver.step != self.progress.step:
            self.save()
        with self.engine.world.agreed():
            self.saver.wait()
        run, (why, status) = self.engine.run, reason
        done = f"{why} after step {self.progress.step} of {run.steps}, which is saved"
        raise RunInterrupted(f"{done}; `leapalign resume {run.out}` goes on", status)

    def leave_out(self, error: NotFinite) -> Metrics:
        """Count a batch of NaN or infinity and return the metrics of a step without it.

        Raises NotFinite beyond `max_nonfinite_batches`.
        """
        before, limit = self.progress.nonfinite_batches, self.engine.run.max_nonfinite_batches
        if before >= limit:
            counted = f" (max_nonfinite_batches is {limit}; {before} were left out before)" if limit else ""
            beyond = NotFinite(f"{error}{counted}")
            beyond.elsewhere = error.elsewhere
            raise beyond
        self.progress.nonfinite_batches += 1
        self.engine.kept.clear()  # the rollouts of a batch that is left out
        self.engine.rolled_out.clear()
        learning.forget(self.engine)
        self.tracker.note(f"{error}. This batch was left out: {before + 1} of at most {limit}")
        return {"nonfinite_batch": 1, "skipped": 1}


def open_folder(run: Run, resume: bool) -> Path:
    """Return the run's folder: its own if it is resumed, else a new or empty one. Raises UserError."""
    out = Path(run.out)
    if resume:
        refuse_links_out(out)
        refuse_other_kinds(
            out, files=("run.json", FILE, "metrics.jsonl", LOG, "summary.json", LOCK, HOLDER), folders=("checkpoints",)
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make the run's folder ({error.strerror})") from None
    if not resume and not is_empty(out):  # asked now: new/.. is there only with new
        raise UserError(f"{out}: this folder is not empty; use `leapalign resume {out}`, or another --out")
    return out


def tell_short_average(tracker: Tracker | Silent, run: Run) -> None:
    """Warn at the start if the averaged weights will hold little of the training."""
    if text := short_average(run):
        tracker.note(text)


def tell(
    tracker: Tracker | Silent, origin: Checkpoint, progress: Progress, changes: list[str], aside: list[Path]
) -> None:
    """Tell the user where a resumed run starts; changed settings are also recorded in its checkpoints."""
    tracker.note(f"resuming from {origin.folder.name}")
    if changes:
        progress.changes.append({"step": progress.step, "changes": changes})
        tracker.note("with changed settings:\n  " + "\n  ".join(changes))
    if others := differences(origin.state["versions"], versions()):
        tracker.note("with other versions, so numbers may differ in the last bits: " + ", ".join(others))
    for path in aside:
        tracker.note(f"a later checkpoint is kept as {path.name}")

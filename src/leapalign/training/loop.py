"""The training loop: load, restore, update by update (update.py), evaluate on the fixed set, save.

A batch with NaN or infinity stops the run, or is skipped and counted, up to `max_nonfinite_batches`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.checkpoint import checkpoints
from leapalign.checkpoint.async_writer import Saver
from leapalign.checkpoint.best import BestWeights
from leapalign.checkpoint.inputs import FILE
from leapalign.checkpoint.sharded import writers_of
from leapalign.checkpoint.state import Checkpoint, Progress
from leapalign.checkpoint.unchanged import check_derived, check_unchanged
from leapalign.codec import dumps
from leapalign.distributed.process_group import joined
from leapalign.distributed.world import World
from leapalign.errors import NotFinite, UserError
from leapalign.flow.graph import CheckpointsBlocks
from leapalign.run import Run
from leapalign.storage.atomic import complete_folder, disk_errors, write_text
from leapalign.storage.lock import run_lock
from leapalign.training import batches, out_of_memory, self_checks
from leapalign.training.batches import Start
from leapalign.training.engine import Engine, build, inputs_record
from leapalign.training.learning import BELIEVED
from leapalign.training.out_of_memory import Setup
from leapalign.training.preemption import Stop, on_signals
from leapalign.training.session import Session, open_folder, tell, tell_short_average
from leapalign.training.summary import summarize
from leapalign.training.tracking import Metrics, Silent, Tracker, kept_metrics
from leapalign.training.update import update


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run."""

    out: Path
    saved: Path  # the tuned model with averaged weights: out/pipeline, or out/lora for an adapter
    summary: dict[str, Any]  # also in out/summary.json
    engine: Engine  # with `stop_when`, its average is that of the best evaluation, as saved

    @property
    def pipeline(self) -> Path:
        """The tuned pipeline's folder. Raises UserError if the run leaves an adapter."""
        if self.saved.name != "pipeline":
            raise UserError(f"{self.out}: this run leaves {self.saved}; `leapalign export` merges it into a pipeline")
        return self.saved


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint from which a run continues, and how the run's settings differ from those it was saved with."""

    checkpoint: Checkpoint | None = None  # None: the run starts
    changes: list[str]
    named: bool  # chosen by the user: later checkpoints are renamed


def train(
    run: Run,
    *,
    resume: bool = False,
    checkpoint: str = "",
    allow_changes: bool = False,
    on_step: Callable[[Metrics], None] | None = None,
) -> Result:
    """Train from the base, or continue from `run.out`'s newest checkpoint (or the one named).

    `on_step` receives each step's metrics. Raises UserError for errors that the user can fix, RunStopped on NaN,
    infinity or too little memory, RunInterrupted if the run was asked to stop and has saved a checkpoint.
    """
    stop = Stop(max_seconds=3600 * run.max_hours)
    with joined(run) as world, ExitStack() as held:
        out = _take_folder(run, world, resume, held)
        origin = _origin(run, world, checkpoint, allow_changes)
        engine, progress = _load(run, world, origin)
        inputs = _inputs(engine, origin, allow_changes)
        with _begin(run, world, origin, progress, inputs) as tracker:
            for note in engine.notes:
                tracker.note(note)
            best = _train_steps(engine, progress, tracker, stop, inputs, on_step)
        if run.stop_when.evaluations and progress.evaluations:
            best.restore(progress.best_step, engine.ema.shadow)
        saved = _save_tuned(engine, out)
        summary = summarize(run, progress) if world.main else {}
    return Result(out=out, saved=saved, summary=summary, engine=engine)


def _take_folder(run: Run, world: World, resume: bool, held: ExitStack) -> Path:
    """Return the run's folder, locked by rank 0 and with errors of a full disk translated until `held` closes."""
    with world.agreed():
        out = open_folder(run, resume) if world.main else Path(run.out)
    held.enter_context(disk_errors(out, f"make room, then `leapalign resume {out}`: checkpoints there are whole"))
    with world.agreed():
        if world.main:
            held.enter_context(run_lock(out))
    return out


def _origin(run: Run, world: World, checkpoint: str, allow_changes: bool) -> Origin:
    found, changes = None, []
    with world.agreed():
        if world.main:
            found = checkpoints.find(run, checkpoint)
            changes = check_unchanged(run, found, allow_changes)
    return Origin(checkpoint=world.from_main(found), changes=changes, named=bool(checkpoint))


def _load(run: Run, world: World, origin: Origin) -> tuple[Engine, Progress]:
    with out_of_memory.explained(run, "loading", Setup(world=world, loading=True)):
        done = checkpoints.progress_of(origin.checkpoint)
        engine = build(run, world, Start(done.step, done.samples))
        with world.agreed():
            progress = checkpoints.restore(origin.checkpoint, engine.parameters, engine.ema.shadow, engine.optimizer)
            engine.norms.extend(progress.grad_norms)
            learnt = checkpoints.restored_learnt(origin.checkpoint)
            if engine.value_model and learnt:
                engine.learner.restore(learnt)
        if run.self_checks:
            self_checks.at_start(engine)
    return engine, progress


def _inputs(engine: Engine, origin: Origin, allow_changes: bool) -> dict[str, Any]:
    """Return the run's inputs. Raises UserError if values derived from them differ from the checkpoint's."""
    with engine.world.agreed():
        inputs = inputs_record(engine)
        origin.changes.extend(check_derived(engine.run, origin.checkpoint, inputs["derived"], allow_changes))
    return inputs


def _begin(run: Run, world: World, origin: Origin, progress: Progress, inputs: dict[str, Any]) -> Tracker | Silent:
    """Write the run's settings and inputs to its folder, and open the metrics; called once all is loaded."""
    tracker: Tracker | Silent = Silent()
    with world.agreed():
        if world.main:
            out = Path(run.out)
            kept_metrics(
                out / "metrics.jsonl", progress.metrics_bytes
            )  # raises UserError before any file of the run is replaced
            (out / "checkpoints").mkdir(exist_ok=True)
            write_text(out / "run.json", dumps(run))
            write_text(out / FILE, json.dumps(inputs, indent=2) + "\n")
            aside = checkpoints.set_aside(run, origin.checkpoint) if origin.checkpoint and origin.named else []
            tracker = Tracker(out, progress.step, run.steps, progress.metrics_bytes)
            if origin.checkpoint:
                tell(tracker, origin.checkpoint, progress, origin.changes, aside)
            tell_short_average(tracker, run)
    return tracker


def _train_steps(
    engine: Engine,
    progress: Progress,
    tracker: Tracker | Silent,
    stop: Stop,
    inputs: dict[str, Any],
    on_step: Callable[[Metrics], None] | None,
) -> BestWeights:
    """Train until the last step, or until `stop_when` ends the run; return the kept weights of the best evaluation."""
    run, begun = engine.run, time.monotonic() - progress.seconds
    setup, writers = _setup(engine), writers_of(engine.parameters, engine.world)
    best = BestWeights(run, engine.world, writers, progress.best_step)
    with on_signals(stop), Saver(asynchronous=run.async_checkpoints, parameters=engine.parameters) as saver:
        parts = {"progress": progress, "tracker": tracker, "saver": saver, "stop": stop, "inputs": inputs}
        session = Session(engine=engine, writers=writers, best=best, **parts)
        if progress.step == 0 and run.evaluate_every:
            tracker.log({"step": 0} | session.evaluate())
        while progress.step < run.steps and not session.stopped():
            started = time.monotonic()
            with out_of_memory.explained(run, f"step {progress.step + 1}", setup):
                metrics = _step(session)
                progress.seconds = time.monotonic() - begun
                metrics = {"step": progress.step} | metrics | {"seconds": time.monotonic() - started}
                _warn_above(tracker, metrics)
                tracker.log(metrics)
                if _due(run, progress.step, run.checkpoint_every) or session.stopped():
                    session.save()
            saver.check()
            stop.took(time.monotonic() - started)
            if on_step:
                on_step(metrics)
            if progress.step < run.steps and session.between_rollouts and not session.stopped():
                session.leave_if_asked()
        if why := session.stopped():
            tracker.note(
                f"{why}. Step {progress.best_step} is exported; `leapalign resume {run.out} --no-stop-when` goes on"
            )
    return best


def _setup(engine: Engine) -> Setup:
    policy = engine.model.policy
    held = out_of_memory.held_sizes(engine.parameters, engine.ema.shadow, policy)
    blocks, sharded = isinstance(policy, CheckpointsBlocks), engine.shards is not None
    return Setup(world=engine.world, sharded=sharded, blocks=blocks, held=held)


def _step(session: Session) -> Metrics:
    """Take the next update, or skip its batch; then evaluate on the fixed set, if due."""
    engine, progress = session.engine, session.progress
    begins = session.between_rollouts
    try:
        metrics = update(engine, progress.step)
    except NotFinite as error:
        metrics = session.leave_out(error)
    engine.optimizer.zero_grad(set_to_none=True)  # frees memory for the evaluation and the save
    progress.step += 1
    progress.samples += batches.prompts_per_batch(engine.run) if begins else 0  # as `Start.place` counts them
    progress.skipped += metrics["skipped"]
    return metrics | (session.evaluate() if _due(engine.run, progress.step, engine.run.evaluate_every) else {})


def _save_tuned(engine: Engine, out: Path) -> Path:
    """Write the tuned model with the averaged weights, from rank 0."""
    saved = out / engine.run.tuning.output
    with engine.ema.applied():
        model = engine.whole_model(frozen=False)
        if model is not None:
            with complete_folder(saved) as folder:
                engine.run.tuning.save(model, folder)
    return saved


def _warn_above(tracker: Tracker | Silent, metrics: Metrics) -> None:
    believed = metrics.get(BELIEVED, 1)  # a value model that is not leaves no gradient either
    if believed and metrics.get("fraction_above_threshold", 0) > 0.5 and not tracker.warned:
        tracker.warned = True
        share = f"{metrics['fraction_above_threshold']:.0%}"
        tracker.note(
            f"step {metrics['step']}: {share} of the batch lies above the threshold and has no gradient of the reward; "
            "a higher threshold would train it"
        )


def _due(run: Run, step: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == run.steps)

"""The training loop (arXiv 2604.15311, Algorithm 1): reward, gradient at the latent, then at the weights, AdamW, EMA.

Micro-batches are whole: noise, rollout, reward's gradient, backward, then the next one. The loss is divided by the
whole batch, so that 1 x 8 = 2 x 4 = 8 x 1.

Decided on purpose:
- an update without gradient (every sample above its threshold, or a draw that leaves no differentiated step) takes no
  step at all: no AdamW, no weight decay, no EMA; it counts as a step and in `skipped`;
- gradients are clipped at 1 by default, which the paper does not state and public code does;
- a batch that is NaN or infinite stops the run, or is left out and counted, up to `max_nonfinite_batches`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leapalign.checkpoint import checkpoints
from leapalign.checkpoint.async_writer import Saver
from leapalign.checkpoint.checkpoints import Checkpoint, Progress
from leapalign.checkpoint.sharded import writers_of
from leapalign.codec import dumps
from leapalign.distributed.world import joined, sum_gradients
from leapalign.errors import NotFinite, UserError
from leapalign.flow.graph import with_graph
from leapalign.flow.rollout import Velocity, rollout
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import LatentGradient, latent_gradient
from leapalign.run import Run
from leapalign.storage.atomic import complete_folder, disk_errors, write_text
from leapalign.storage.lock import run_lock
from leapalign.training import batches, out_of_memory, self_checks
from leapalign.training.batches import MicroBatch, noise_generators
from leapalign.training.engine import Engine, build
from leapalign.training.finite import check_gradients, check_rows
from leapalign.training.metrics import batch_metrics, of_all_ranks
from leapalign.training.preemption import Stop, on_signals
from leapalign.training.session import Session, open_folder, tell
from leapalign.training.summary import summarize
from leapalign.training.tracking import Metrics, Silent, Tracker, kept_metrics
from leapalign.training.weights import clip_gradients, gradient_norm


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run gives back."""

    out: Path
    saved: Path  # the tuned model, averaged weights: out/pipeline, or what else the way of tuning leaves
    summary: dict[str, Any]  # also in out/summary.json
    engine: Engine

    @property
    def pipeline(self) -> Path:
        """The tuned pipeline's folder. UserError where the run leaves an adapter."""
        if self.saved.name != "pipeline":
            raise UserError(f"{self.out}: this run leaves {self.saved}; `leapalign export` merges it into a pipeline")
        return self.saved


def train(
    run: Run,
    *,
    resume: bool = False,
    checkpoint: str = "",
    allow_changes: bool = False,
    on_step: Callable[[Metrics], None] | None = None,
) -> Result:
    """Train from the base, or go on from `run.out`'s newest checkpoint (or the one named). `on_step` sees each step's
    metrics.

    Raises UserError for what the user can mend, RunStopped where NaN or infinity appears or memory does not suffice,
    RunInterrupted where the run was asked to stop and has saved itself.
    """
    stop = Stop(max_seconds=3600 * run.max_hours)
    with joined(run) as world:
        with world.agreed():
            out = open_folder(run, resume) if world.main else Path(run.out)
        way_out = f"make room, then `leapalign resume {out}`: checkpoints there are whole"
        with disk_errors(out, way_out), ExitStack() as lock:
            origin, changes = None, []
            with world.agreed():
                if world.main:
                    lock.enter_context(run_lock(out))
                    origin = checkpoints.find(run, checkpoint)
                    changes = checkpoints.check_unchanged(run, origin, allow_changes)
            origin = world.from_main(origin)
            with out_of_memory.explained(run, "loading", [], loading=True):
                engine = build(run, world)
                with world.agreed():
                    progress = checkpoints.restore(origin, engine.parameters, engine.ema, engine.optimizer)
                if run.self_checks:
                    self_checks.at_start(engine)
            with world.agreed():
                tracker = _begin(run, origin, checkpoint, progress, changes) if world.main else Silent()
            with tracker:
                _train_steps(engine, progress, tracker, stop, on_step)
            saved, summary = out / run.tuning.output, {}
            with engine.ema.applied():
                model = engine.whole_model(frozen=False)
                if model is not None:
                    with complete_folder(saved) as folder:
                        run.tuning.save(model, folder)
            if world.main:
                summary = summarize(run, progress)
    return Result(out=out, saved=saved, summary=summary, engine=engine)


def _begin(run: Run, origin: Checkpoint | None, checkpoint: str, progress: Progress, changes: list[str]) -> Tracker:
    """Everything is loaded: the run's folder says what is trained from here on."""
    out = Path(run.out)
    kept_metrics(out / "metrics.jsonl", progress.metrics_bytes)  # refused before anything of the run is replaced
    (out / "checkpoints").mkdir(exist_ok=True)
    write_text(out / "run.json", dumps(run))
    aside = checkpoints.set_aside(run, origin) if origin and checkpoint else []
    tracker = Tracker(out, progress.step, run.steps, progress.metrics_bytes)
    if origin:
        tell(tracker, origin, progress, changes, aside)
    return tracker


def _train_steps(
    engine: Engine, progress: Progress, tracker: Tracker | Silent, stop: Stop, on_step: Callable[[Metrics], None] | None
) -> None:
    run, begun = engine.run, time.monotonic() - progress.seconds
    plan = out_of_memory.parts_in_memory(engine.parameters, engine.ema.shadow, engine.model.policy)
    with on_signals(stop), Saver(asynchronous=run.async_checkpoints, parameters=engine.parameters) as saver:
        parts = {"progress": progress, "tracker": tracker, "saver": saver, "stop": stop}
        session = Session(engine=engine, writers=writers_of(engine.parameters, engine.world), **parts)
        if progress.step == 0 and run.evaluate_every:
            tracker.log({"step": 0} | probe(engine))
        while progress.step < run.steps:
            started = time.monotonic()
            with out_of_memory.explained(run, f"step {progress.step + 1}", plan):
                metrics = _step(session)
                progress.seconds = time.monotonic() - begun
                metrics = {"step": progress.step} | metrics | {"seconds": time.monotonic() - started}
                _warn_above(tracker, metrics)
                tracker.log(metrics)
                if _due(run, progress.step, run.checkpoint_every):
                    session.save()
            saver.check()
            stop.took(time.monotonic() - started)
            if on_step:
                on_step(metrics)
            if progress.step < run.steps:
                session.leave_if_asked()


def _step(session: Session) -> Metrics:
    """The next update, or none where its batch is left out; then the probe, where it is due."""
    engine, progress = session.engine, session.progress
    try:
        metrics = update(engine, progress.step)
    except NotFinite as error:
        metrics = session.leave_out(error)
    engine.optimizer.zero_grad(set_to_none=True)  # before the probe and a save, which need the room
    progress.step += 1
    progress.skipped += metrics["skipped"]
    return metrics | (probe(engine) if _due(engine.run, progress.step, engine.run.evaluate_every) else {})


def update(engine: Engine, step: int) -> Metrics:
    """One optimiser step on one batch; `skipped` is 1 where there was no gradient and so no step."""
    engine.optimizer.zero_grad(set_to_none=True)
    run, world, sharded = engine.run, engine.world, engine.shards is not None
    trained, parts = False, []
    with run.tuning.in_update(engine.model.policy, run.seed, step):
        for micro in batches.micro_batches(run, engine.prompts, step, world.rank, world.size):
            with world.agreed(NotFinite):
                surrogate = _surrogate(engine, micro)
            with world.agreed(NotFinite) as some:
                result = _gradient_at_latent(engine, micro, surrogate)
                own = some.any = surrogate.has_gradient and result.has_gradient
            with world.agreed(NotFinite):
                if own or (sharded and some.any):  # backwards of sharded weights are made by all ranks or none
                    surrogate.backward(result.grad)
                    norm = gradient_norm(engine.parameters)
                    check_gradients(norm, engine.parameters, micro.prompts, step + 1)
            trained = trained or some.any
            parts.append((surrogate.metrics, result))
    norm = _summed_gradients(engine) if trained else torch.zeros(())
    if trained:
        clip_gradients(engine.parameters, norm, engine.run.max_grad_norm)
        set_learning_rate(engine, step)
        engine.optimizer.step()
        engine.ema.update()
    return batch_metrics(of_all_ranks(world, parts)) | {"grad_norm": float(norm), "skipped": int(not trained)}


def _summed_gradients(engine: Engine) -> Tensor:
    """The whole batch's gradients in every rank's .grad, and their norm; sharded ones were summed on the way."""
    whole_on_each = {name: p for name, p in engine.parameters.items() if not isinstance(p, DTensor)}
    sum_gradients(engine.world, whole_on_each)
    return gradient_norm(engine.parameters)


def set_learning_rate(engine: Engine, step: int) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(engine.run, step)


def learning_rate(run: Run, step: int) -> float:
    """Of the update after `step` others: a function of the step alone, so a resumed run needs no scheduler's state."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    passed = min(1.0, (step - run.warmup_steps) / run.decay_steps) if run.decay_steps else 0.0
    return run.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * passed)) / 2)


def _surrogate(engine: Engine, micro: MicroBatch) -> Surrogate:
    """Rollout with the differentiated forwards in it; finite."""
    run, model, step = engine.run, engine.model, micro.step + 1
    x = model.noise(noise_generators(run.seed, micro.step, micro.samples)).to(engine.sigmas.device)
    renoise = noise_generators(run.seed, micro.step, micro.samples, "method noise")
    draws = run.method.draw(
        run.num_sampling_steps,
        batches.draw_generator(run, micro),
        lambda n: torch.stack([model.noise(renoise) for _ in range(n)]),
    )
    with engine.rollout():
        surrogate = run.method(_velocity(engine, micro.prompts), x, engine.sigmas, draws)
    check_rows(surrogate.x_hat.detach(), "the latent x_hat", micro.prompts, step)
    return surrogate


def _gradient_at_latent(engine: Engine, micro: MicroBatch, surrogate: Surrogate) -> LatentGradient:
    """The loss and its gradient at the latent; all finite."""
    run, step = engine.run, micro.step + 1
    score = partial(_score, engine, micro.prompts)
    result = latent_gradient(surrogate, score, engine.terms, chunk=run.reward_chunk, batch_size=run.batch_size)
    for name, reward in result.rewards.items():
        check_rows(reward, f"the reward {name}", micro.prompts, step)
    check_rows(result.loss[None], "the loss", [", ".join(micro.prompts)], step)
    check_rows(result.grad, "the reward's gradient at the latent", micro.prompts, step)
    return result


def _velocity(engine: Engine, prompts: tuple[str, ...]) -> Velocity:
    velocity = with_graph(engine.model.velocity(engine.model.encode(list(prompts))), engine.run.graph)
    return engine.shards.velocity(velocity) if engine.shards else velocity


def _score(engine: Engine, prompts: tuple[str, ...], latents: Tensor, rows: list[int]) -> dict[str, Tensor]:
    images = engine.model.decode(latents)
    texts = [prompts[row] for row in rows]
    return {name: reward(images, texts) for name, reward in engine.rewards.items()}


@torch.no_grad()
def probe(engine: Engine) -> Metrics:
    """r(x_0) of the averaged weights on fixed prompts and noise: one curve that is comparable between methods."""
    run, world, texts = engine.run, engine.world, batches.probe_prompts(engine.run, engine.prompts)
    totals = torch.zeros(len(engine.rewards), dtype=torch.float64)
    part, one_round = run.micro_batch_size, run.micro_batch_size * world.size
    with engine.ema.applied():
        for start in range(world.rank * part, len(texts) + world.rank * part, one_round):
            rows = range(start, min(start + part, len(texts)))
            made = rows or range(1)  # past the end: a forward like the other ranks', which counts for nothing
            if engine.rewards_in_step:
                made = [min(row, len(texts) - 1) for row in range(start, start + part)]
            prompts = tuple(texts[row] for row in made)
            x = engine.model.noise(noise_generators(run.evaluation_seed, 0, made, "probe")).to(engine.sigmas.device)
            with engine.rollout():
                x_0 = rollout(_velocity(engine, prompts), x, engine.sigmas)
            scores = _score(engine, prompts, x_0, list(range(len(prompts)))).values()
            totals += torch.tensor([float(reward[: len(rows)].sum()) for reward in scores], dtype=torch.float64)
    world.sum_([totals])
    means = {name: float(total) / len(texts) for name, total in zip(engine.rewards, totals)}
    parts = {f"evaluation_reward/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
    return {"evaluation_reward": sum(means.values())} | parts


def _warn_above(tracker: Tracker | Silent, metrics: Metrics) -> None:
    if metrics.get("fraction_above_threshold", 0) > 0.5 and not tracker.warned:
        tracker.warned = True
        share = f"{metrics['fraction_above_threshold']:.0%}"
        tracker.note(
            f"step {metrics['step']}: {share} of the batch lies above the threshold and trains nothing; raise it"
        )


def _due(run: Run, step: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == run.steps)

"""The training loop (arXiv 2604.15311, Algorithm 1): reward, gradient at the latent, then at the weights, AdamW, EMA.

Micro-batches are whole: noise, rollout, reward's gradient, backward, then the next one. The loss is divided by the
whole batch, so that 1 x 8 = 2 x 4 = 8 x 1.

Decided on purpose:
- an update without gradient (every sample above its threshold, or a draw that leaves no differentiated step) takes no
  step at all: no AdamW, no weight decay, no EMA; it counts as a step and in `skipped`;
- gradients are clipped at 1 by default, which the paper does not state and public code does;
- a batch that is NaN or infinite stops the run, or is left out and counted, up to `max_bad_batches`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leapalign.codec import dumps
from leapalign.errors import NotFinite, UserError
from leapalign.flow.graph import inputs_only
from leapalign.flow.rollout import Velocity, rollout
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import Hinge, LatentGradient, latent_gradient
from leapalign.prompts import Prompt
from leapalign.run import RewardTerm, Run
from leapalign.training import batches, checkpoints, memory_errors, self_checks
from leapalign.training.batches import MicroBatch, noise_generators
from leapalign.training.checkpoints import Checkpoint, Progress
from leapalign.training.distributed import World, joined, sum_gradients, world_device
from leapalign.training.files import complete_folder, disk_errors, refuse_links_out, refuse_other_kinds, write_text
from leapalign.training.guard import check_gradients, check_rows
from leapalign.training.lock import LOCK, run_lock
from leapalign.training.metrics import batch_metrics, of_all_ranks
from leapalign.training.saver import Saver
from leapalign.training.session import Session, tell
from leapalign.training.shards import Shards, shard
from leapalign.training.stopping import Stop, on_signals
from leapalign.training.summary import summarize
from leapalign.training.tracking import Metrics, Silent, Tracker, kept_metrics
from leapalign.training.weights import EMA, Named, clip_gradients, gradient_norm, trained_parameters

ALONE = World()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A run with everything loaded: what an update needs."""

    run: Run
    model: Any  # leapalign.models.base.Model
    rewards: dict[str, Callable[[Tensor, list[str]], Tensor]]
    terms: dict[str, Hinge]
    prompts: list[Prompt]
    parameters: Named
    optimizer: torch.optim.AdamW
    ema: EMA
    sigmas: Tensor
    world: World
    shards: Shards | None  # None: every rank has the whole policy

    def rollout(self) -> AbstractContextManager[None]:
        """Around the forwards of a rollout."""
        return self.shards.rollout() if self.shards else nullcontext()

    def whole_model(self, *, frozen: bool) -> Any:
        """The model with whole weights on rank 0, None on the others; of sharded ones a copy. Every rank must call it.

        Without `frozen`, weights that are not trained may lack values.
        """
        if self.shards is None:
            return self.model if self.world.main else None
        policy = self.shards.whole_policy(self.world.main, frozen=frozen)
        if policy is None:
            return None
        model = copy.copy(self.model)
        model.policy = policy
        return model


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
            out = _open_folder(run, resume) if world.main else Path(run.out)
        way_out = f"make room, then `leapalign resume {out}`: checkpoints there are whole"
        with disk_errors(out, way_out), ExitStack() as lock:
            origin, changes = None, []
            with world.agreed():
                if world.main:
                    lock.enter_context(run_lock(out))
                    origin = checkpoints.find(run, checkpoint)
                    changes = checkpoints.check_unchanged(run, origin, allow_changes)
            origin = world.from_main(origin)
            with memory_errors.explained(run, "loading", [], loading=True):
                engine = build(run, world)
                with world.agreed():
                    progress = checkpoints.restore(origin, engine.parameters, engine.ema, engine.optimizer)
                if run.self_checks:
                    self_checks.at_start(engine)
            with world.agreed():
                tracker = _begin(run, origin, checkpoint, progress, changes) if world.main else Silent()
            try:
                _train_steps(engine, progress, tracker, stop, on_step)
            finally:
                tracker.close()
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


def build(run: Run, world: World = ALONE) -> Engine:
    """Load model, rewards and prompts, and encode every prompt that the run will meet; then shard, if that is asked."""
    _refuse_without_gradient(run)
    names = reward_names(run)
    with world.agreed():
        device = resolve_device(world_device(run.device, world))
        prompts = run.prompts.load()
        model = run.model.load(device, run.dtype, run.tuning)
        run.tuning.initialise(model.policy, run.seed)
        model.prepare(batches.prompts_used(run, prompts))
        if run.graph == "blocks":
            _checkpoint_blocks(model.policy)
        trained_parameters(model.policy)
        rewards = {name: load_reward(term, device, run.dtype) for name, term in zip(names, run.rewards)}
    world.check_equal(run, model.policy)
    shards = shard(run, model.policy, world)
    parameters = trained_parameters(model.policy)
    return Engine(
        run=run,
        world=world,
        shards=shards,
        model=model,
        rewards=rewards,
        terms={
            name: Hinge(threshold=t.threshold, weight=t.weight, unit_gradient=t.unit_gradient)
            for name, t in zip(names, run.rewards)
        },
        prompts=prompts,
        parameters=parameters,
        optimizer=_adamw(run, parameters),
        ema=EMA(parameters, run.ema_decay),
        sigmas=model.sigmas(run.num_sampling_steps).to(device),
    )


def load_reward(term: RewardTerm, device: str, dtype: str) -> Callable[[Tensor, list[str]], Tensor]:
    """The term's reward on its own device; images go there, scores come back, and so does the gradient."""
    if not term.device:
        return term.reward.load(device, term.dtype or dtype)
    there = resolve_device(term.device)
    reward = term.reward.load(there, term.dtype or dtype)
    return lambda images, prompts: reward(images.to(there), prompts).to(images.device)


def _train_steps(
    engine: Engine, progress: Progress, tracker: Tracker | Silent, stop: Stop, on_step: Callable[[Metrics], None] | None
) -> None:
    run, begun = engine.run, time.monotonic() - progress.seconds
    plan = memory_errors.parts_in_memory(engine.parameters, engine.ema.shadow, engine.model.policy)
    with on_signals(stop), Saver(asynchronous=run.async_checkpoints, parameters=engine.parameters) as saver:
        session = Session(engine=engine, progress=progress, tracker=tracker, saver=saver, stop=stop)
        if progress.step == 0 and run.probe_every:
            tracker.log({"step": 0} | probe(engine))
        while progress.step < run.steps:
            started = time.monotonic()
            with memory_errors.explained(run, f"step {progress.step + 1}", plan):
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
    progress.step += 1
    progress.skipped += metrics["skipped"]
    return metrics | (probe(engine) if _due(engine.run, progress.step, engine.run.probe_every) else {})


def update(engine: Engine, step: int) -> Metrics:
    """One optimiser step on one batch; `skipped` is 1 where there was no gradient and so no step."""
    engine.optimizer.zero_grad(set_to_none=True)
    run, world, sharded = engine.run, engine.world, engine.shards is not None
    trained, parts = False, []
    with run.tuning.in_update(engine.model.policy, run.seed, step):
        for micro in batches.micro_batches(run, engine.prompts, step, world.rank, world.size):
            with world.agreed(NotFinite) as some:
                surrogate, result = _surrogate_and_gradient(engine, micro)
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


def _surrogate_and_gradient(engine: Engine, micro: MicroBatch) -> tuple[Surrogate, LatentGradient]:
    """Rollout with the differentiated forwards in it, then the loss and its gradient at the latent; all finite."""
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
    score = partial(_score, engine, micro.prompts)
    result = latent_gradient(surrogate, score, engine.terms, chunk=run.reward_chunk, batch_size=run.batch_size)
    for name, reward in result.rewards.items():
        check_rows(reward, f"the reward {name}", micro.prompts, step)
    check_rows(result.loss[None], "the loss", [", ".join(micro.prompts)], step)
    check_rows(result.grad, "the reward's gradient at the latent", micro.prompts, step)
    return surrogate, result


def _velocity(engine: Engine, prompts: tuple[str, ...]) -> Velocity:
    velocity = engine.model.velocity(engine.model.encode(list(prompts)))
    if engine.shards:
        velocity = engine.shards.velocity(velocity)
    return inputs_only(velocity) if engine.run.graph == "inputs" else velocity


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
            prompts = tuple(texts[row] for row in made)
            x = engine.model.noise(noise_generators(run.probe_seed, 0, made, "probe")).to(engine.sigmas.device)
            with engine.rollout():
                x_0 = rollout(_velocity(engine, prompts), x, engine.sigmas)
            scores = _score(engine, prompts, x_0, list(range(len(prompts)))).values()
            totals += torch.tensor([float(reward.sum()) if rows else 0.0 for reward in scores], dtype=torch.float64)
    world.sum_([totals])
    means = {name: float(total) / len(texts) for name, total in zip(engine.rewards, totals)}
    parts = {f"probe_reward/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
    return {"probe_reward": sum(means.values())} | parts


def _warn_above(tracker: Tracker | Silent, metrics: Metrics) -> None:
    if metrics.get("above_lambda", 0) > 0.5 and not tracker.warned:
        tracker.warned = True
        share = f"{metrics['above_lambda']:.0%}"
        tracker.note(
            f"step {metrics['step']}: {share} of the batch lies above the threshold and trains nothing; raise it"
        )


def _due(run: Run, step: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == run.steps)


def reward_names(run: Run) -> list[str]:
    """Each reward's name; a second one of the same class gets a number."""
    names: list[str] = []
    for term in run.rewards:
        name = getattr(term.reward, "name", type(term.reward).__name__)
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _refuse_without_gradient(run: Run) -> None:
    """Before anything is loaded; a reward of the user's own that does not say has one."""
    for name, term in zip(reward_names(run), run.rewards):
        if not getattr(term.reward, "differentiable", True):
            raise UserError(
                f"the reward {name} has no gradient, and {run.method.name} trains by the reward's gradient; use it in "
                f"evaluation (leapalign evaluate --reward {name}), and train with a differentiable one (leapalign list)"
            )


def _checkpoint_blocks(policy: nn.Module) -> None:
    switch = getattr(policy, "enable_gradient_checkpointing", None)
    if switch is None:
        raise UserError(f"graph=blocks: {type(policy).__name__} cannot checkpoint its blocks; use graph=inputs")
    switch()


def _adamw(run: Run, parameters: Named) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr=run.learning_rate, betas=run.betas, weight_decay=run.weight_decay)


def resolve_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None
    return name


def _open_folder(run: Run, resume: bool) -> Path:
    out = Path(run.out)
    if resume:
        refuse_links_out(out)
        refuse_other_kinds(out, files=("run.json", "metrics.jsonl", "summary.json", LOCK), folders=("checkpoints",))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make the run's folder ({error.strerror})") from None
    if not resume and any(path.name != LOCK for path in out.iterdir()):  # now: new/.. is there only with new
        raise UserError(f"{out}: this folder is not empty; use `leapalign resume {out}`, or another --out")
    return out

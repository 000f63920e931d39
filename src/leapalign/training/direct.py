"""One update of a direct-gradient method (arXiv 2604.15311, Algorithm 1).

Micro-batches are whole: noise, rollout, the reward's gradient at the latent, backward, then the next one. The loss is
divided by the whole batch, so that 1 x 8 = 2 x 4 = 8 x 1.

A method may clip the gradients at the latent by those of the whole batch (RSM), and the anchor of the mean needs the
mean of the whole batch (leapalign.training.batch_mean). All micro-batches are then rolled out and scored before the
first backward.

Our choices, where the paper states none:
- an update without gradient (every sample above its threshold, or a draw without differentiated step) changes nothing:
  no AdamW, weight decay or EMA; it counts as a step and in `skipped`;
- gradients are clipped at norm 1 by default, as in public code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leapalign.distributed.world import sum_gradients
from leapalign.flow.graph import TrainedVelocity
from leapalign.flow.leap import per_sample
from leapalign.methods.base import ClipsGradients, Method, ReusesRollouts, Samples, Surrogate
from leapalign.methods.objective import LatentGradient, latent_gradient, reweighted
from leapalign.run import Run
from leapalign.training import batches, learning
from leapalign.training.batch_mean import share_mean
from leapalign.training.batches import MicroBatch
from leapalign.training.engine import Engine, Kept
from leapalign.training.finite import check_finite, not_finite
from leapalign.training.metrics import Part, batch_metrics, of_all_ranks, part_of
from leapalign.training.stages import voted
from leapalign.training.tracking import Metrics
from leapalign.training.weights import clip_gradients, clipping_norm, gradient_norm


def update(engine: Engine, step: int) -> Metrics:
    """Take one optimiser step on one batch; `skipped` is 1 if there was no gradient and so no step.

    `step`: updates before this one. Raises NotFinite before any weight changes.
    """
    engine.optimizer.zero_grad(set_to_none=True)
    with engine.run.tuning.in_update(engine.model.policy, engine.run.seed, step):
        if new_rollouts(engine, step):
            engine.kept.clear()
            parts = on_new_rollouts(engine, step)
        else:
            parts = on_kept_rollouts(engine)
    trained = engine.world.any(any(part.trained for part in parts))
    taken = take_step(engine, step) if trained else NO_STEP
    found = batch_metrics(of_all_ranks(engine.world, parts)) | taken | {"skipped": int(not trained)}
    return found | learning.learn(engine, step)


def take_step(engine: Engine, step: int) -> Metrics:
    """Clip the gradients and update weights and average; return the norm before clipping, and whether it was clipped.

    Raises NotFinite.
    """
    norm = whole_gradient(engine, step)
    value = float(norm)
    ceiling = clipping_norm(engine.run, engine.norms, value)
    clip_gradients(engine.parameters, norm, ceiling)
    set_learning_rate(engine, step)
    engine.optimizer.step()
    engine.ema.update()
    return {"grad_norm": value, "clipped": int(0 < ceiling < value)}


NO_STEP: Metrics = {"grad_norm": 0.0, "clipped": 0}


class Scored(NamedTuple):
    """A micro-batch before its backward."""

    velocity: TrainedVelocity
    surrogate: Surrogate
    later: list[Surrogate]  # of later updates on the same rollout, which hold states only
    result: LatentGradient


def on_new_rollouts(engine: Engine, step: int) -> list[Part]:
    """Roll out every micro-batch of this rank and add its gradient to the weights' .grad.

    A surrogate is freed before the next rollout, so that there is never more than one graph, even if the rewards leave
    no gradient. Where all micro-batches wait for the whole batch, they hold states only.
    """
    micros, method = engine.micro_batches(step), engine.run.method
    if not (isinstance(method, ClipsGradients) or engine.run.mean_across):
        return [train(engine, scored(engine, micro)) for micro in micros]
    waiting, parts = [scored(engine, micro) for micro in micros], []
    if isinstance(method, ClipsGradients):
        waiting = clipped(engine, method, waiting)
    if engine.run.mean_across:
        due = [(each.velocity, 1 + len(each.later)) for each in waiting]
        share_mean(engine.world, due, waiting[0].result.grad[0], fresh=True)
    while waiting:
        parts.append(train(engine, waiting.pop(0)))
    return parts


def on_kept_rollouts(engine: Engine) -> list[Part]:
    """Add the gradient of every micro-batch of this rank, on rollouts of an earlier update, to the weights' .grad."""
    if engine.run.mean_across:
        due = [(kept.velocity, len(kept.later)) for kept in engine.kept]
        share_mean(engine.world, due, engine.kept[0].result.grad[0], fresh=False)
    return [again(engine, kept) for kept in engine.kept]


def scored(engine: Engine, micro: MicroBatch) -> Scored:
    """Roll out a micro-batch and score it."""
    velocity = engine.velocity(micro.prompts)
    surrogate, *later = roll_out(engine, micro, velocity)
    return Scored(velocity, surrogate, later, gradient_at_latent(engine, micro, surrogate))


def clipped(engine: Engine, method: ClipsGradients, batch: list[Scored]) -> list[Scored]:
    """Scale the samples' gradients at the latent down to the method's ceiling; metric: the share of them, [N]."""
    norms = [each.result.grad.flatten(1).norm(dim=1) for each in batch]
    every = engine.world.gather(torch.cat(norms).tolist())
    ceiling = method.ceiling([norm for of_rank in every for norm in of_rank])
    found = []
    for each, norm in zip(batch, norms):
        factor = ceiling / norm.clamp(min=ceiling) if ceiling else torch.ones_like(norm)
        metrics = each.surrogate.metrics | {"gradient_clipped": (norm > ceiling).to(norm.dtype)}
        result = replace(each.result, grad=each.result.grad * per_sample(factor, each.result.grad))
        found.append(each._replace(surrogate=replace(each.surrogate, metrics=metrics), result=result))
    return found


def train(engine: Engine, each: Scored) -> Part:
    """Add the gradient of a micro-batch to the weights' .grad; keep what later updates need."""
    velocity, surrogate, later, result = each
    if later:
        engine.kept.append(Kept(velocity=velocity, later=later, weight=surrogate.weight, result=result))
    return backward(engine, velocity, surrogate, result)


def again(engine: Engine, kept: Kept) -> Part:
    """Add the gradient of a micro-batch whose rollout, and reward's gradient, are of an earlier update."""
    surrogate, batch_size = kept.later.pop(0), engine.run.batch_size
    result = reweighted(kept.result, engine.terms, kept.weight, surrogate.weight, batch_size)
    return backward(engine, kept.velocity, surrogate, result)


def backward(engine: Engine, velocity: TrainedVelocity, surrogate: Surrogate, result: LatentGradient) -> Part:
    """Propagate the gradient at the latent into the weights' .grad, unless no sample has any."""
    trained = surrogate.has_gradient and (result.has_gradient or engine.anchor is not None)
    trained = trained and not learning.policy_rests(engine)
    if engine.world.any(trained) if engine.shards else trained:  # with sharded weights all ranks run backward, or none
        surrogate.backward(result.grad)
    return part_of(surrogate, result, trained, measured(velocity), engine.run.batch_size)


@voted
def roll_out(engine: Engine, micro: MicroBatch, velocity: TrainedVelocity) -> list[Surrogate]:
    """Roll out from noise to image: a surrogate for each update until the next rollouts. Raises NotFinite."""
    run, method = engine.run, cast("Method[Any]", engine.run.method)
    rng, samples = batches.draw_generator(run, micro), samples_of(engine, micro)
    updates = run.updates_per_rollout - micro.step % run.updates_per_rollout
    draws = [method.draw(run.num_sampling_steps, rng, samples) for _ in range(updates)]
    noise = engine.noise(micro)
    with engine.rollout():
        if isinstance(method, ReusesRollouts) and (run.updates_per_rollout > 1 or run.skip_satisfied):
            surrogates = method.surrogates(velocity, noise, engine.sigmas, draws)
        else:
            surrogates = [method(velocity, noise, engine.sigmas, draws[0])]
    check_finite({"the latent x_hat": surrogates[0].x_hat.detach()}, micro.prompts, micro.step + 1)
    return surrogates


@voted
def gradient_at_latent(engine: Engine, micro: MicroBatch, surrogate: Surrogate) -> LatentGradient:
    """Return the loss (Eqs. 11, 13) and its gradient at the latent; frees the rewards' graph. Raises NotFinite."""
    score = partial(engine.score, micro.prompts)
    chunk, batch_size = engine.run.reward_chunk, engine.run.batch_size
    result = latent_gradient(surrogate, score, learning.terms(engine), chunk=chunk, batch_size=batch_size)
    tensors = {f"the reward {name}": reward for name, reward in result.rewards.items()}
    tensors |= {"the loss": result.loss, "the reward's gradient at the latent": result.grad}
    tensors |= learning.collect(engine, len(micro.prompts))
    check_finite(tensors, micro.prompts, micro.step + 1)
    return result


def new_rollouts(engine: Engine, step: int) -> bool:
    """Return whether update `step` rolls out: every `updates_per_rollout`th, and after a batch was left out."""
    return step % engine.run.updates_per_rollout == 0 or not any(kept.later for kept in engine.kept)


def measured(velocity: TrainedVelocity) -> dict[str, Tensor]:
    """Return what a micro-batch's backward measured at its differentiated states, and forget it.

    [B] each, or a 0-dim 0 if there was no backward.
    """
    found = {"anchor": velocity.drift()} if velocity.anchor else {}
    if velocity.staleness is not None:
        found["staleness"] = torch.stack(velocity.staleness).mean(0) if velocity.staleness else torch.zeros(())
        velocity.staleness.clear()
    return found


def whole_gradient(engine: Engine, step: int) -> Tensor:
    """Sum the gradients over the ranks and return their norm, 0-dim. Raises NotFinite, the same on every rank."""
    replicated = {name: p for name, p in engine.parameters.items() if not isinstance(p, DTensor)}
    sum_gradients(engine.world, replicated)  # gradients of sharded weights are summed in the backward pass
    norm = gradient_norm(engine.parameters)
    if not math.isfinite(value := float(norm)):
        micros = batches.micro_batches(engine.run, engine.prompts, step, begin=engine.begin)  # of all ranks
        prompts = [text for micro in micros for text in micro.prompts]
        error = not_finite(value, engine.parameters, prompts, step + 1)
        error.elsewhere = not engine.world.main  # rank 0 prints it
        raise error
    return norm


def set_learning_rate(engine: Engine, step: int) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(engine.run, step)


def learning_rate(run: Run, step: int) -> float:
    """Return the learning rate after `step` updates: a function of the step alone, without scheduler state."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    passed = min(1.0, (step - run.warmup_steps) / run.decay_steps) if run.decay_steps else 0.0
    return run.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * passed)) / 2)


def samples_of(engine: Engine, micro: MicroBatch) -> Samples:
    """Describe the micro-batch to the method; noise that the method draws itself is seeded per sample."""
    generators = micro.generators(engine.run.seed, "method noise")
    sharing = engine.run.samples_per_draw or engine.run.batch_size
    return Samples(
        count=len(micro.samples),
        noise=lambda n: torch.stack([engine.model.noise(generators) for _ in range(n)]),
        first=micro.samples.start % sharing,
        sharing=sharing,
        rollouts=micro.step // engine.run.updates_per_rollout,
    )

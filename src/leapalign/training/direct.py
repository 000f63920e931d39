"""One update of a direct-gradient method (arXiv 2604.15311, Algorithm 1).

Micro-batches are whole: noise, rollout, the reward's gradient at the latent, backward, then the next one. The loss is
divided by the whole batch, so that 1 x 8 = 2 x 4 = 8 x 1.

Our choices, where the paper states none:
- an update without gradient (every sample above its threshold, or a draw without differentiated step) changes nothing:
  no AdamW, weight decay or EMA; it counts as a step and in `skipped`;
- gradients are clipped at norm 1 by default, as in public code.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leapalign.distributed.world import sum_gradients
from leapalign.methods.base import Samples, Surrogate
from leapalign.methods.objective import LatentGradient, latent_gradient
from leapalign.run import Run
from leapalign.training import batches
from leapalign.training.batches import MicroBatch
from leapalign.training.engine import Engine
from leapalign.training.finite import check_finite, not_finite
from leapalign.training.metrics import Part, batch_metrics, of_all_ranks, part_of
from leapalign.training.stages import voted
from leapalign.training.tracking import Metrics
from leapalign.training.weights import clip_gradients, gradient_norm


def update(engine: Engine, step: int) -> Metrics:
    """Take one optimiser step on one batch; `skipped` is 1 if there was no gradient and so no step.

    `step`: updates before this one. Raises NotFinite before any weight changes.
    """
    engine.optimizer.zero_grad(set_to_none=True)
    with engine.run.tuning.in_update(engine.model.policy, engine.run.seed, step):
        parts = [micro_batch(engine, micro) for micro in engine.micro_batches(step)]
    trained = engine.world.any(any(part.trained for part in parts))
    norm = torch.zeros(())
    if trained:
        norm = whole_gradient(engine, step)
        clip_gradients(engine.parameters, norm, engine.run.max_grad_norm)
        set_learning_rate(engine, step)
        engine.optimizer.step()
        engine.ema.update()
    return batch_metrics(of_all_ranks(engine.world, parts)) | {"grad_norm": float(norm), "skipped": int(not trained)}


def micro_batch(engine: Engine, micro: MicroBatch) -> Part:
    """Add the gradient of a micro-batch to the weights' .grad.

    The surrogate is freed on return, so that its graph never outlives the call, even if the rewards leave no gradient.
    """
    surrogate = roll_out(engine, micro)
    result = gradient_at_latent(engine, micro, surrogate)
    trained = surrogate.has_gradient and (result.has_gradient or engine.anchor is not None)
    if engine.world.any(trained) if engine.shards else trained:  # with sharded weights all ranks run backward, or none
        surrogate.backward(result.grad)
    anchored = {"anchor": engine.anchor.measured()} if engine.anchor else {}
    return part_of(surrogate, result, trained, anchored)


@voted
def roll_out(engine: Engine, micro: MicroBatch) -> Surrogate:
    """Roll out from noise to image, with the method's differentiated forwards. Raises NotFinite."""
    method = engine.run.method
    rng, samples = batches.draw_generator(engine.run, micro), _samples(engine, micro)
    draws = method.draw(engine.run.num_sampling_steps, rng, samples)
    with engine.rollout():
        surrogate = method(engine.velocity(micro.prompts), engine.noise(micro), engine.sigmas, draws)
    check_finite({"the latent x_hat": surrogate.x_hat.detach()}, micro.prompts, micro.step + 1)
    return surrogate


@voted
def gradient_at_latent(engine: Engine, micro: MicroBatch, surrogate: Surrogate) -> LatentGradient:
    """Return the loss (Eqs. 11, 13) and its gradient at the latent; frees the rewards' graph. Raises NotFinite."""
    score = partial(engine.score, micro.prompts)
    chunk, batch_size = engine.run.reward_chunk, engine.run.batch_size
    result = latent_gradient(surrogate, score, engine.terms, chunk=chunk, batch_size=batch_size)
    tensors = {f"the reward {name}": reward for name, reward in result.rewards.items()}
    tensors |= {"the loss": result.loss, "the reward's gradient at the latent": result.grad}
    check_finite(tensors, micro.prompts, micro.step + 1)
    return result


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


def _samples(engine: Engine, micro: MicroBatch) -> Samples:
    """Describe the micro-batch to the method; noise that the method draws itself is seeded per sample."""
    generators = micro.generators(engine.run.seed, "method noise")
    sharing = engine.run.samples_per_draw or engine.run.batch_size
    return Samples(
        count=len(micro.samples),
        noise=lambda n: torch.stack([engine.model.noise(generators) for _ in range(n)]),
        first=micro.samples.start % sharing,
        sharing=sharing,
    )

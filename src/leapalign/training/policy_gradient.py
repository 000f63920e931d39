"""One update of a policy-gradient method: roll out and score a batch, then train its kept steps.

A batch of B samples has B / G prompts, each with a group of G neighbouring samples (`Run.samples_per_prompt`). It is
rolled out in micro-batches without graph; all rewards are gathered, so that each sample's advantage is that within its
whole group, on any number of ranks. `Run.updates_per_rollout` E: update e trains the e-th of E equal parts of the
batch, in its order. A kept step has one forward with graph and a backward of its own; losses are means over the part's
samples and steps.

The probability ratio must be 1 in the first update after a rollout, because no weight has changed. A run whose ratio is
not stops: its training forward computes another velocity than the rollout's, and would train on noise.

An update whose advantages are all 0 (each group has equal rewards) changes nothing, unless the method has a term of its
own; it counts in `skipped`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from leapalign.errors import RunStopped, UserError
from leapalign.flow.rollout import Velocity
from leapalign.methods.policy_gradient import PolicyGradient, SamplesFromAverage, Term, Trajectory, advantages
from leapalign.training import batches
from leapalign.training.batches import MicroBatch
from leapalign.training.direct import NO_STEP, samples_of, take_step
from leapalign.training.engine import Engine, RolledOut
from leapalign.training.finite import check_finite
from leapalign.training.tracking import Metrics

RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # |rho - 1| from rounding alone
Numbers = dict[str, Tensor]  # name -> [b] of a micro-batch's samples, on the CPU


def update(engine: Engine, step: int) -> Metrics:
    """Take one optimiser step on one part of a batch; `skipped` is 1 if there was nothing to train.

    `step`: updates before this one. Raises NotFinite, or RunStopped for a wrong ratio, before any weight changes.
    """
    run = engine.run
    engine.optimizer.zero_grad(set_to_none=True)
    begins = step % run.updates_per_rollout == 0 or not engine.rolled_out
    rolled = step if begins else engine.rolled_out[0].micro.step
    with run.tuning.in_update(engine.model.policy, run.seed, rolled):  # one dropout mask for a rollout and its updates
        if begins:
            roll_out_batch(engine, step)
        part = part_of(engine.rolled_out, run.updates_per_rollout, step)
        trained = engine.world.any(method_of(engine).needs_base or any(bool(r.advantages.any()) for r in part))
        found = [train(engine, rolled_out, step, first=begins) for rolled_out in part] if trained else []
    taken = NO_STEP
    if trained:
        if isinstance(run.method, SamplesFromAverage):
            engine.ema.decay = run.method.average_decay(step + 1)
        taken = take_step(engine, step)
    metrics = batch_metrics(engine, found) | taken | {"skipped": int(not trained)}
    if (step + 1) % run.updates_per_rollout == 0:
        engine.rolled_out.clear()
    return metrics


def part_of(rolled_out: Sequence[RolledOut], updates: int, step: int) -> Sequence[RolledOut]:
    """Return this rank's micro-batches of the part of the batch that update `step` trains."""
    size = len(rolled_out) // updates
    return rolled_out[step % updates * size :][:size]


def method_of(engine: Engine) -> PolicyGradient:
    return cast("PolicyGradient", engine.run.method)


# Rolling out


@torch.no_grad()
def roll_out_batch(engine: Engine, step: int) -> None:
    """Roll out and score this rank's micro-batches, and give each its advantages."""
    engine.rolled_out.clear()
    found = [(*roll_out(engine, micro), micro) for micro in engine.micro_batches(step)]
    scored = [score(engine, micro, trajectory) for trajectory, _, micro in found]
    rewards = of_all_ranks(engine, scored)
    given = batch_advantages(engine, rewards)
    for trajectory, velocity, micro in found:
        rows = slice(micro.samples.start, micro.samples.stop)
        state = {"micro": micro, "velocity": velocity, "steps": trajectory.steps}
        engine.rolled_out.append(RolledOut(advantages=given[rows], rewards=rewards, **state))


def roll_out(engine: Engine, micro: MicroBatch) -> tuple[Trajectory, Velocity]:
    """Roll out from noise to image and keep what is trained. Raises NotFinite on all ranks."""
    method = method_of(engine)
    with engine.world.agreed(RunStopped):
        velocity = engine.velocity(micro.prompts)
        rng, samples = batches.draw_generator(engine.run, micro), samples_of(engine, micro)
        draws = method.draw(engine.run.num_sampling_steps, rng, samples)
        with engine.rollout(), engine.sampling_weights():
            trajectory = method.roll_out(velocity, noise(engine, micro), engine.sigmas, draws)
        check_finite({"the latent x_0": trajectory.x_0}, micro.prompts, micro.step + 1)
    return trajectory, velocity


def noise(engine: Engine, micro: MicroBatch) -> Tensor:
    """Draw x_T [B, ...]; for methods with `same_noise`, one for each prompt."""
    group = engine.run.samples_per_prompt if method_of(engine).same_noise else 1
    samples = [sample // group * group for sample in micro.samples]
    generators = batches.noise_generators(engine.run.seed, micro.step, samples)
    return engine.model.noise(generators).to(engine.sigmas.device)


def score(engine: Engine, micro: MicroBatch, trajectory: Trajectory) -> Numbers:
    """Decode and score x_0, in chunks: each reward [B] in float64. Raises NotFinite on all ranks."""
    parts: list[Mapping[str, Tensor]] = []
    with engine.world.agreed(RunStopped):
        size = engine.run.reward_chunk or len(micro.prompts)
        for start in range(0, len(micro.prompts), size):
            rows = range(start, min(start + size, len(micro.prompts)))
            parts.append(engine.score(micro.prompts, trajectory.x_0[start : rows.stop], rows))
            for name, reward in parts[-1].items():
                if reward.shape != (len(rows),):
                    raise UserError(f"reward {name}: got shape {list(reward.shape)}, expected [{len(rows)}]")
        rewards = {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}
        found = {f"the reward {name}": reward for name, reward in rewards.items()}
        check_finite(found, micro.prompts, micro.step + 1)
    return rewards


def batch_advantages(engine: Engine, rewards: Numbers) -> Tensor:
    """Return the advantages of the whole batch: [B], float64."""
    method = method_of(engine)
    groups = torch.arange(engine.run.batch_size) // engine.run.samples_per_prompt
    weights = {name: term.weight for name, term in engine.terms.items()}
    limit = method.advantage_limit
    return advantages(rewards, weights, groups, method.normalisation).clamp(-limit, limit)


# Training


def train(engine: Engine, rolled_out: RolledOut, step: int, *, first: bool) -> Numbers:
    """Add the gradient of a micro-batch's kept steps to the weights' .grad; return means over its steps, [B] each."""
    micro, count = rolled_out.micro, engine.run.batch_size // engine.run.updates_per_rollout
    given = rolled_out.advantages.to(engine.sigmas.device)
    found: list[Numbers] = []
    with engine.world.agreed(RunStopped):
        for kept in rolled_out.steps:
            term = method_of(engine).loss(rolled_out.velocity, base_of(engine, rolled_out.velocity), kept, given)
            (term.loss.sum() / (count * len(rolled_out.steps))).backward()
            found.append(numbers_of(term))
        means = {name: torch.stack([numbers[name] for numbers in found]) for name in found[0]}
        check_finite({"the loss": means["loss"].mean(0)}, micro.prompts, step + 1)
        if first and "ratio_deviation" in means:
            check_ratio(engine, means["ratio_deviation"].amax(0), micro.prompts, step + 1)
    return {name: values.mean(0).cpu() for name, values in means.items()}


def base_of(engine: Engine, velocity: Velocity) -> Velocity:
    """Return the base's velocity, without graph."""

    @torch.no_grad()
    def base(x: Tensor, sigma: Tensor) -> Tensor:
        assert engine.base, "the method's needs_base says whether it is loaded"
        with engine.base():
            return velocity(x, sigma)

    return base


def numbers_of(term: Term) -> Numbers:
    """Return the numbers of one step's term, [B] each, without graph."""
    found = {"loss": term.loss.detach()} | term.metrics
    if term.log_ratio is not None:
        found["ratio_deviation"] = (term.log_ratio.exp() - 1).abs()
    return found


def check_ratio(engine: Engine, deviation: Tensor, prompts: Sequence[str], step: int) -> None:
    """Raise RunStopped unless every probability ratio is 1 within rounding. `deviation`: the largest |rho - 1|, [B]."""
    worst, tolerance = int(deviation.argmax()), RATIO_TOLERANCE[engine.run.dtype]
    if not float(deviation[worst]) <= tolerance:  # also true for NaN
        raise RunStopped(
            f"step {step}: the probability ratio is off 1 by {float(deviation[worst]):.2g} (expected at most "
            f"{tolerance:g}) for the prompt {prompts[worst]!r}, though no weight has changed since the rollout. The "
            "forward with gradient computes another velocity than the rollout's: look for dropout, another guidance, "
            f"or layers that act on the whole batch; or compute more exactly than in {engine.run.dtype}. The step was "
            "not taken"
        )


# Metrics


def of_all_ranks(engine: Engine, parts: Sequence[Numbers]) -> Numbers:
    """Join the micro-batches of all ranks, in the order of the samples, on every rank."""
    rounds = zip(*engine.world.gather(list(parts)))
    joined = [part for each in rounds for part in each]
    return {name: torch.cat([part[name] for part in joined]) for name in joined[0]} if joined else {}


def batch_metrics(engine: Engine, found: Sequence[Numbers]) -> Metrics:
    """Return one line of metrics.jsonl: the rollout's rewards, and the means of the trained part."""
    rewards = engine.rolled_out[0].rewards
    total = sum(rewards.values(), torch.zeros(engine.run.batch_size, dtype=torch.float64))
    groups = total.unflatten(0, (-1, engine.run.samples_per_prompt))
    metrics: Metrics = {name: float(values.double().mean()) for name, values in of_all_ranks(engine, found).items()}
    metrics = {"loss": metrics.pop("loss", 0.0), "reward": float(total.mean()), **metrics}
    metrics |= {"reward_std": float(total.std(correction=0)), "group_std": float(groups.std(1, correction=0).mean())}
    metrics["equal_groups"] = float((groups.amax(1) == groups.amin(1)).double().mean())
    if len(rewards) > 1:
        metrics |= {f"reward/{name}": float(reward.mean()) for name, reward in rewards.items()}
    return metrics

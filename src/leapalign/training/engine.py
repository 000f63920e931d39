"""A loaded run: model, rewards, prompts, optimiser and average, on one rank or several.

The loading order saves memory: the policy is loaded and sharded before text encoders and rewards; the encoders are
freed before the rewards are loaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leapalign.checkpoint.inputs import inputs_of
from leapalign.distributed import broadcast
from leapalign.distributed.choice import check_fits, choose
from leapalign.distributed.fsdp import Shards
from leapalign.distributed.fsdp_frozen import check_names, shard_rewards
from leapalign.distributed.process_group import resolve_device, world_device
from leapalign.distributed.prompts import prepare
from leapalign.distributed.tensors import Named
from leapalign.distributed.world import World
from leapalign.evaluation.diversity import Features
from leapalign.flow.anchor import Anchor
from leapalign.flow.graph import TrainedVelocity, checkpoint_blocks, with_graph
from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import Hinge, LatentGradient
from leapalign.methods.policy_gradient import PolicyGradient, SamplesFromAverage
from leapalign.models.base import Model
from leapalign.models.decode import with_pixel_gradient
from leapalign.models.pipeline import tell_longer_prompts
from leapalign.monitors import HeldOut
from leapalign.prompts import Prompt
from leapalign.prompts.base import ImageMonitor
from leapalign.rewards import adapt
from leapalign.rewards.base import Reward
from leapalign.rewards.value_model.model import Seen, ValueReward
from leapalign.run import RewardTerm, Run
from leapalign.training import batches, monitors
from leapalign.training.batches import BEGINNING, MicroBatch, Start
from leapalign.training.reference import Reference
from leapalign.training.refusals import check_method, refuse_sharded_base
from leapalign.training.weights import EMA, trained_parameters
from leapalign.tuning.quantization import base_note

ALONE = World()
Base: TypeAlias = Callable[[], AbstractContextManager[None]]  # inside, the policy has the base's weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """A micro-batch's rollout, for the updates that use it again."""

    velocity: TrainedVelocity
    later: list[Surrogate]  # one for each of these updates; states and velocities of the rollout, without activations
    weight: Tensor  # [N] of the first update's surrogate, which is in `result`
    result: LatentGradient  # the reward's gradient at the latent


@dataclass(frozen=True, kw_only=True, eq=False)
class RolledOut:
    """A micro-batch that was rolled out and scored, for a policy-gradient method."""

    micro: MicroBatch
    velocity: Velocity
    steps: Sequence[Any]  # what the method keeps of each trained step
    advantages: Tensor  # [b] of this micro-batch, on the CPU
    rewards: dict[str, Tensor]  # [B] of the whole batch, on the CPU


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A loaded run with everything that an update needs."""

    run: Run
    model: Model
    rewards: dict[str, Reward]
    terms: dict[str, Hinge]
    prompts: list[Prompt]
    begin: Start  # where this process starts in the prompts
    parameters: Named
    optimizer: torch.optim.AdamW
    ema: EMA
    sigmas: Tensor  # [T + 1], ascending, on the model's device
    world: World
    shards: Shards | None  # None: every rank has the whole policy
    anchor: Anchor | None = None  # None: no pull towards the base
    kept: list[Kept] = field(default_factory=list)  # this rank's micro-batches of the last rollouts, if used again
    rolled_out: list[RolledOut] = field(default_factory=list)  # the same, for policy-gradient methods
    norms: list[float] = field(default_factory=list)  # gradient norms of the last updates, for Run.clip_quantile
    fresh: list[Seen] = field(default_factory=list)  # this rank's micro-batches of this update, for a value model
    held_out: dict[str, Reward] = field(default_factory=dict)  # measured in evaluations, never trained on
    features: Features | None = None  # space of the diversity that evaluations measure; None: they do not
    own_monitor: ImageMonitor | None = None  # the prompts' own
    base: Base | None = None  # for anchor and drift; None: neither
    notes: tuple[str, ...] = ()  # messages for the user about choices made on loading

    @property
    def value_model(self) -> str:
        """Name of the reward that is learnt in this run; empty if none is."""
        return next((name for name, reward in self.rewards.items() if isinstance(reward, ValueReward)), "")

    @property
    def learner(self) -> ValueReward:
        """The reward that is learnt in this run, which must have one."""
        reward = self.rewards[self.value_model]
        assert isinstance(reward, ValueReward)
        return reward

    @property
    def rewards_in_step(self) -> bool:
        """True if all ranks must score the same number of images."""
        return self.world.size > 1 and bool(self.run.shard_rewards)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of update `step`."""
        return batches.micro_batches(self.run, self.prompts, step, self.world.rank, self.world.size, self.begin)

    def noise(self, micro: MicroBatch, purpose: str = "noise") -> Tensor:
        """Draw standard normal noise [B, *latent]; each row is a function of (seed, step, sample)."""
        return self.model.noise(micro.generators(self.run.seed, purpose)).to(self.sigmas.device)

    def velocity(self, prompts: Sequence[str]) -> TrainedVelocity:
        """Return the policy's velocity for these prompts, with activations kept as `Run.graph` says.

        Only inputs are kept where micro-batches wait for the mean of the batch (leapalign.training.batch_mean).
        """
        texts = list(prompts)
        velocity = self.model.velocity(self.model.encode(texts))
        graph = "inputs" if self.run.waits_for_mean(self.world.size) else self.run.graph
        settings: dict[str, Any] = {"graph": graph, "anchor": self.anchor}
        if self.run.skip_satisfied:
            settings["part"] = lambda rows: self.model.velocity(self.model.encode([texts[row] for row in rows]))
        settings["staleness"] = [] if self.run.updates_per_rollout > 1 else None
        if self.shards:
            settings |= {"recomputation": self.shards.recomputation, "before": self.shards.before_forward}
        return with_graph(velocity, **settings)

    def rollout(self) -> AbstractContextManager[None]:
        """Context for the forwards of a rollout."""
        return self.shards.rollout() if self.shards else nullcontext()

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Context in which the policy has the weights that the method rolls out with."""
        return self.ema.applied() if isinstance(self.run.method, SamplesFromAverage) else nullcontext()

    def images(self, latents: Tensor) -> Tensor:
        """Decode latents [n, ...] to images [n, 3, H, W] in [0, 1], differentiable."""
        return with_pixel_gradient(self.model.decode(latents), self.run.pixel_gradient)

    def score(self, prompts: Sequence[str], latents: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        """Decode latents [n, ...]; return each reward [n], differentiable. latents[i] belongs to prompts[rows[i]].

        A value model observes the images.
        """
        images = self.images(latents)
        texts = [prompts[row] for row in rows]
        scores = {name: reward(images, texts) for name, reward in self.rewards.items()}
        if self.value_model:
            self.learner.observe(images, texts, scores[self.value_model])
        return scores

    def whole_model(self, *, frozen: bool) -> Model | None:
        """Return the model with whole weights on rank 0 (a copy if sharded), None elsewhere. Every rank must call it.

        Without `frozen`, frozen weights of the copy may be on the meta device.
        """
        if self.shards is None:
            return self.model if self.world.main else None
        policy = self.shards.whole_policy(self.world.main, frozen=frozen)
        if policy is None:
            return None
        model = copy.copy(self.model)
        model.policy = policy
        return model


def build(run: Run, world: World = ALONE, begin: Start = BEGINNING) -> Engine:
    """Load model, rewards and prompts; encode every prompt that the run reaches; shard if the run asks for it."""
    check_method(run)
    monitors.check_bands(run)
    names, others = reward_names(run), monitors.held_out_names(run)
    check_names(run, names)
    with world.agreed():
        device = resolve_device(world_device(run.device, world))
    world.check_settings(run)
    with world.agreed():
        prompts = run.prompts.load()
        model = run.model.load(device, run.dtype, run.tuning, broadcast.loading(run, world, device))
        run.tuning.initialise(model.policy, run.seed)
        checkpoint_blocks(model.policy, run.graph)
        trained_parameters(model.policy)
    choice = choose(run, model.policy, world, device)
    refuse_sharded_base(run, choice.sharded)
    with world.agreed():
        check_fits(run, model.policy, world, device)
    shards = broadcast.spread(run, model.policy, world, device)
    reached = [batches.prompts_used(run, prompts, begin, rank, world.size) for rank in range(world.size)]
    texts = [text for texts in reached for text in texts]
    with world.agreed():
        tell_longer_prompts(model, texts, show=world.main)
    prepare(run, model, reached, world, device)
    with world.agreed():
        rewards = {name: load_reward(term, device, run.dtype) for name, term in zip(names, run.rewards)}
        held_out = {name: load_reward(term, device, run.dtype) for name, term in zip(others, run.monitors.held_out)}
        features = monitors.features_of(run, rewards, held_out)
    if world.main:
        adapt.tell_longer(rewards, texts)
    rewards = shard_rewards(run, rewards, world, device)
    parameters = trained_parameters(model.policy)
    base = None
    if needs_base(run):
        settings: dict[str, Any] = {"bfloat16": run.dtype == "bfloat16", "in_cpu_memory": run.base_copy == "cpu"}
        base = Reference(model.policy, parameters, shards=shards, **settings).applied
    return Engine(
        run=run,
        world=world,
        shards=shards,
        base=base,
        anchor=_anchor(run, base) if base and run.anchored else None,
        notes=tuple(filter(None, (choice.why, base_note(model.policy, run.tuning)))),
        model=model,
        rewards=rewards,
        held_out=held_out,
        features=features,
        own_monitor=monitors.own_monitor(run),
        terms={
            name: Hinge(threshold=t.threshold, weight=t.weight, unit_gradient=t.unit_gradient)
            for name, t in zip(names, run.rewards)
        },
        prompts=prompts,
        begin=begin,
        parameters=parameters,
        optimizer=_adamw(run, parameters),
        ema=EMA(parameters, run.ema_decay),
        sigmas=model.sigmas(run.num_sampling_steps).to(device),
    )


def load_reward(term: RewardTerm | HeldOut, device: str, dtype: str) -> Reward:
    """Load the term's reward on its own device; images are copied there, scores and gradients back."""
    there = resolve_device(term.device) if term.device else device
    reward = adapt.load_reward(term.reward, there, term.dtype or dtype)
    return adapt.OnDevice(reward=reward, device=there) if term.device else reward


def reward_names(run: Run) -> list[str]:
    """Return each reward's name; repeated names get a number."""
    return adapt.numbered_names([term.reward for term in run.rewards])


def needs_base(run: Run) -> bool:
    """True if the run keeps the base's values of the trained weights."""
    of_method = isinstance(run.method, PolicyGradient) and run.method.needs_base
    return run.anchored or bool(run.monitors.drift_samples) or of_method


def inputs_record(engine: Engine) -> dict[str, Any]:
    """Return the run's inputs as checkpoints record them (leapalign.checkpoint.inputs). Rank 0 reads the files."""
    noise = engine.model.noise(batches.noise_generators(engine.run.seed, 0, [0]))
    derived = {
        "sigmas": [float(sigma) for sigma in engine.sigmas],
        "latent_shape": list(noise.shape[1:]),
        "trained_parameters": sum(p.numel() for p in engine.parameters.values()),
    }
    inputs = inputs_of(engine.run, engine.prompts) if engine.world.main else {}
    return {"folder": os.getcwd(), "inputs": inputs, "derived": derived}


def _anchor(run: Run, base: Base) -> Anchor:
    return Anchor(
        weight=run.anchor_weight,
        mean_weight=run.anchor_mean_weight,
        reference=base,
        batch_size=run.batch_size,
        nested=run.anchor_states == "all",
        across=run.mean_across,
    )


def _adamw(run: Run, parameters: Named) -> torch.optim.AdamW:
    """Create AdamW with foreach off: torch's default on CUDA allocates temporaries for all tensors at once."""
    decayed = [p for p in parameters.values() if run.decay_biases_and_norms or p.ndim > 1]
    others = [p for p in parameters.values() if not run.decay_biases_and_norms and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=run.learning_rate,
        betas=run.betas,
        eps=run.adam_eps,
        foreach=False,
    )

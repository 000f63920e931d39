"""`Run`: all settings of a training run, as one frozen value that run.json replays exactly.

Plug-ins (model, method, rewards, prompts, tuning) are frozen dataclasses that match the protocol in their folder's
base.py. The type checker sees the protocols; at runtime the fields are `Any`, and this file imports no plug-in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from leapalign.codec import check_fields, with_new_names
from leapalign.errors import UserError
from leapalign.monitors import NEVER, NOTHING, Monitors, StopWhen
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from leapalign.methods.base import Method
    from leapalign.methods.policy_gradient import PolicyGradient
    from leapalign.models.base import ModelConfig
    from leapalign.prompts.base import Prompts
    from leapalign.rewards.base import RewardConfig
    from leapalign.tuning.base import Tuning

    AnyMethod = Method[Any] | PolicyGradient[Any]
else:  # the types that the codec and the command line see
    AnyMethod = ModelConfig = Prompts = RewardConfig = Tuning = Any


R = TypeVar("R", bound="Run")


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward in the loss: weight * max(0, threshold - r); for policy gradients weight * its advantage."""

    reward: RewardConfig  # a dataclass of leapalign.rewards
    threshold: float  # lambda, Eq. 11: samples above it have no gradient; policy gradients use it in evaluations only
    weight: float = 1.0
    unit_gradient: bool = False  # scale its gradient at each sample's latent to norm 1, before the weight
    device: str = ""  # device of the reward; empty = the model's
    dtype: Literal["", "float32", "bfloat16"] = ""  # of its weights; empty = the run's. Scores are always float32

    def __post_init__(self) -> None:
        check_fields(self)


def _takes_former_names(cls: type[R]) -> type[R]:
    """Let the constructor accept former field names too, as run.json and the command line do."""
    init = cls.__init__

    @functools.wraps(init)
    def construct(self: R, **values: Any) -> None:
        init(self, **with_new_names(values, cls.renamed_fields))

    setattr(cls, "__init__", construct)  # noqa: B010  (pyright refuses the assignment)
    return cls


@_takes_former_names
@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a training run. The defaults are the paper's (Sec. 6.1) where it states them."""

    name: str  # shown in reports only
    model: ModelConfig  # a dataclass of leapalign.models
    method: AnyMethod  # a dataclass of leapalign.methods
    rewards: tuple[RewardTerm, ...]
    prompts: Prompts  # a dataclass of leapalign.prompts
    out: str  # the run's folder; must be new or empty
    tuning: Tuning = FULL  # which weights are trained: a dataclass of leapalign.tuning
    steps: int = 300  # updates
    batch_size: int = 64  # samples per update
    micro_batch_size: int = 1  # samples at a time; divides batch_size, changes no result
    samples_per_prompt: int = 1  # neighbours that share a prompt: the group of a policy-gradient method
    samples_per_draw: int = 0  # neighbours that share a draw (k, j, ...); a multiple of micro_batch_size; 0 = all
    num_sampling_steps: int = 25  # T of the training rollout
    updates_per_rollout: int = 1  # E: updates on the same rollouts (not in the paper); policy gradients: on 1 / E each
    skip_satisfied: bool = (
        False  # no differentiated forward for samples without gradient there; same numbers, less time
    )
    learning_rate: float = 1e-5
    warmup_steps: int = 0  # updates of linear learning-rate warm-up; 0 = none
    decay_steps: int = 0  # updates of cosine decay to a tenth after the warm-up; 0 = constant
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8  # AdamW's epsilon (not in the paper; torch's default)
    weight_decay: float = 1e-4
    decay_biases_and_norms: bool = True  # False: no weight decay for 1-D weights (not in the paper)
    max_grad_norm: float = 1.0  # 0 = no clipping (not in the paper; public code clips at 1)
    clip_quantile: float = 0.0  # clip at this quantile of the last gradient norms too; 0 = off (ours)
    ema_decay: float = 0.995  # of the averaged weights, which are saved and evaluated; 0 = no averaging
    anchor_weight: float = 0.0  # beta of the velocity anchor, which pulls towards the base; 0 = none (not in the paper)
    anchor_mean_weight: float = 0.0  # of the part of v - v_base that all samples share, as a common tone (ours)
    anchor_states: Literal["all", "first"] = "all"  # first: only states without nested gradient, which costs less
    base_copy: Literal["device", "cpu"] = "device"  # memory of the base's weights, for anchors, drift and KL terms
    graph: Literal["all", "blocks", "inputs"] = "all"  # activations kept for the backward pass (flow/graph.py)
    reward_chunk: int = 0  # samples decoded and scored at a time; 0 = the micro-batch
    pixel_gradient: Literal["straight-through", "clamp"] = (
        "straight-through"  # gradient of pixels decoded outside [0, 1]
    )
    seed: int = 0
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto = cuda if available
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes in it over float32 weights
    checkpoint_every: int = 50  # steps; the last step is always saved
    keep_checkpoints: int = 2
    async_checkpoints: bool = True  # copied to CPU memory, then written while training continues
    max_hours: float = 0.0  # per process, which saves in time and exits with status 75; 0 = no limit
    max_nonfinite_batches: int = 0  # batches with NaN or infinity to skip before the run stops
    self_checks: bool = True  # at start-up and at the first save; takes seconds
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"  # of the weights over ranks (docs/distributed.md)
    shard_ranks: int = 0  # hybrid: ranks that share one copy of the weights; 0 = ranks per machine
    gather_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype in which trained shards are gathered
    gather_in_rollout: bool = False  # keep weights gathered between forwards without graph: more memory, less traffic
    shard_rewards: tuple[str, ...] = ()  # names of rewards to shard over the ranks: hpsv3, ...
    shard_text_encoders: bool = False  # shard text encoders over the ranks while encoding
    evaluate_every: int = 10  # steps between evaluations of the averaged weights on the fixed set; 0 = never
    evaluation_size: int = 32  # samples of the fixed set
    evaluation_seed: int = 0  # seed of the fixed set, apart from the run's so that runs compare
    monitors: Monitors = NOTHING  # what evaluations measure besides the training reward (docs/monitors.md)
    stop_when: StopWhen = NEVER  # when to end early, and which weights to export; off by default

    renamed_fields: ClassVar[Mapping[str, str]] = {  # former name -> name; both are read
        "probe_every": "evaluate_every",
        "probe_size": "evaluation_size",
        "probe_seed": "evaluation_seed",
        "max_bad_batches": "max_nonfinite_batches",
    }

    def __post_init__(self) -> None:
        check_fields(self)
        _check_counts(self)
        _check_reals(self)
        _check_geometry(self)
        _check_reuse(self)
        _check_stopping(self)
        if self.gather_dtype == "bfloat16" and self.dtype == "float32":
            raise UserError(
                "gather_dtype bfloat16 with dtype float32: bfloat16 weights would meet float32 arithmetic; set dtype "
                "to bfloat16, or leave gather_dtype at float32"
            )
        if not self.rewards:
            raise UserError("rewards: a run needs at least one reward")
        if not self.out:
            raise UserError("out: a run needs a folder, for instance runs/first")

    @property
    def anchored(self) -> bool:
        """True if some anchor to the base is on."""
        return bool(self.anchor_weight or self.anchor_mean_weight)

    @property
    def mean_across(self) -> bool:
        """True if the anchor of the mean takes it over several micro-batches."""
        return bool(self.anchor_mean_weight) and self.batch_size > self.micro_batch_size

    def waits_for_mean(self, ranks: int) -> bool:
        """Return whether several micro-batches of one of so many ranks wait for that mean before their backward."""
        return self.mean_across and self.batch_size > self.micro_batch_size * ranks


# Settings that may change on resuming: none changes a step that both runs take.
FREE_FIELDS = frozenset(
    {"name", "out", "steps", "checkpoint_every", "keep_checkpoints", "async_checkpoints"}
    | {"max_hours", "max_nonfinite_batches", "self_checks", "sharding", "shard_ranks", "gather_in_rollout"}
    | {"shard_rewards", "shard_text_encoders", "stop_when", "base_copy"}
)
MOST = 10**9  # upper limit of all counts, to catch typing errors and corrupt files
_LEAST = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "num_sampling_steps": 1, "checkpoint_every": 1}
_LEAST |= {"keep_checkpoints": 1, "evaluation_size": 1, "samples_per_draw": 0, "reward_chunk": 0, "evaluate_every": 0}
_LEAST |= {"updates_per_rollout": 1, "warmup_steps": 0, "decay_steps": 0, "max_nonfinite_batches": 0, "shard_ranks": 0}
_LEAST |= {"samples_per_prompt": 1}


def _check_counts(run: Run) -> None:
    for name, least in _LEAST.items():
        if not least <= getattr(run, name) <= MOST:
            raise UserError(f"{name} is {getattr(run, name)}; it must be at least {least} and at most {MOST}")


def _check_reals(run: Run) -> None:
    reals = {"learning_rate": run.learning_rate, "weight_decay": run.weight_decay, "max_grad_norm": run.max_grad_norm}
    reals |= {"max_hours": run.max_hours, "adam_eps": run.adam_eps, "anchor_weight": run.anchor_weight}
    reals |= {"anchor_mean_weight": run.anchor_mean_weight}
    for name, value in reals.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}; it must be finite and not negative")
    shares = {"ema_decay": run.ema_decay, "clip_quantile": run.clip_quantile}
    shares |= {"betas[0]": run.betas[0], "betas[1]": run.betas[1]}
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} is {value}; it must lie in [0, 1)")
    for index, term in enumerate(run.rewards):
        if not (math.isfinite(term.weight) and math.isfinite(term.threshold)):
            raise UserError(f"rewards[{index}]: weight {term.weight} and threshold {term.threshold} must be finite")


def _check_geometry(run: Run) -> None:
    """Raise UserError unless micro-batches divide the batch and the draws, so that accumulation changes no result."""
    batch, micro, share = run.batch_size, run.micro_batch_size, run.samples_per_draw
    if batch % micro:
        sizes = [m for m in range(1, batch + 1) if batch % m == 0]
        raise UserError(
            f"batch_size {batch} cannot be divided into micro-batches of {micro}; "
            f"use batch_size {nearest_multiples(batch, micro)}, or micro_batch_size {nearest(sizes, micro)}"
        )
    if share % micro:
        raise UserError(
            f"samples_per_draw {share} is not a multiple of micro_batch_size {micro}; "
            f"use samples_per_draw {nearest_multiples(share, micro)}, or 0 for the whole batch"
        )
    if batch % run.samples_per_prompt:
        raise UserError(
            f"batch_size {batch} is not a multiple of samples_per_prompt {run.samples_per_prompt}, so a group would "
            f"not be whole; use batch_size {nearest_multiples(batch, run.samples_per_prompt)}"
        )


def _check_reuse(run: Run) -> None:
    """Raise UserError unless a checkpoint, which holds no rollouts, is due only between two rollouts."""
    uses = run.updates_per_rollout
    for name, value in {"steps": run.steps, "checkpoint_every": run.checkpoint_every}.items():
        if value % uses:
            raise UserError(
                f"{name} {value} is not a multiple of updates_per_rollout {uses}, but a checkpoint holds no rollouts; "
                f"use {name} {nearest_multiples(value, uses)}"
            )


def _check_stopping(run: Run) -> None:
    """Raise UserError if the rule that ends the run has nothing to watch. Without evaluations it is off."""
    if run.stop_when.evaluations and not run.monitors.held_out and not run.stop_when.bands:
        raise UserError("stop_when has nothing to watch; give monitors.held_out a reward, or stop_when.bands a band")


def nearest_multiples(value: int, unit: int) -> str:
    """Nearest multiples of `unit` below and above `value`, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def nearest(choices: list[int], value: int) -> str:
    """Nearest allowed values below and above `value`, as text; `choices` ascend from 1."""
    below, above = max(c for c in choices if c <= value), [c for c in choices if c > value]
    return f"{below} or {above[0]}" if above else f"{below}"


def trajectory(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's JSON that determines its numbers: all but FREE_FIELDS."""
    return {key: value for key, value in record.items() if key not in FREE_FIELDS}


def config_hash(record: dict[str, Any]) -> str:
    """Return the sha256 of a run's JSON (from `leapalign.codec.encode`), without fields that change no number."""
    return hashlib.sha256(json.dumps(trajectory(record), sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """List the leaves in which two JSON values differ, as `a.b: 1 -> 2`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


assert {f.name for f in fields(Run)} >= FREE_FIELDS | set(_LEAST)

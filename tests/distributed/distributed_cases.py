"""What torchrun starts once for a number of ranks: every case, its worst deviation from one process, as JSON.

    torchrun --nproc-per-node 2 tests/distributed/distributed_cases.py FOLDER [PART OF A NAME]

Each rank also computes the same in a world of one process. float64, so that only the order of sums is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file as load_tensors
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed_models import GuidedSD3, networks, sd3_with_t5

import tiny_pipelines
from leapalign.checkpoint import checkpoints, sharded
from leapalign.checkpoint.async_writer import Copies
from leapalign.checkpoint.state import Progress
from leapalign.distributed import broadcast, fsdp_frozen
from leapalign.distributed import prompts as rank_prompts
from leapalign.distributed.process_group import joined
from leapalign.distributed.tensors import whole
from leapalign.distributed.world import World
from leapalign.errors import NotFinite, RunInterrupted, RunStopped, UserError
from leapalign.lookup.recipes import load_file
from leapalign.methods import (
    AWM,
    RSM,
    AlignProp,
    DanceGRPO,
    DiffusionNFT,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    FlowDPPO,
    FlowGRPO,
    LeapAlign,
    MixGRPO,
    ReFL,
)
from leapalign.methods.base import NeedsAnchor
from leapalign.models.prompt_embeds import store as prompt_store
from leapalign.models.prompt_embeds.cache import PromptCache
from leapalign.models.prompt_embeds.store import PromptStore
from leapalign.models.sd3 import SD3
from leapalign.monitors import HeldOut, Monitors, StopWhen
from leapalign.rewards.value_model import ValueModel
from leapalign.rewards.value_model.model import ValueReward
from leapalign.run import RewardTerm, Run
from leapalign.storage.pipeline_folder import FROM_FILES
from leapalign.training import batches, direct, fixed_set, loop
from leapalign.training.metrics import BY_STEPS
from leapalign.training.update import update
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA

TINY = load_file(str(Path(__file__).parents[1] / "training" / "tiny_recipe.py"))
PROMPTS, Tiny, TinyModel, TinyReward, Toward, tiny = (
    getattr(TINY, name) for name in ("PROMPTS", "Tiny", "TinyModel", "TinyReward", "Toward", "tiny")
)
MONITORS = Monitors(
    held_out=(HeldOut(reward=Toward(target=0.55)),),
    diversity_prompts=3,
    images_per_prompt=2,
    image_statistics=True,
    drift_samples=3,
)
SMALL_VALUE: dict[str, Any] = {"width": 4, "pixels": 8, "train_steps": 2, "train_batch": 8, "least_parity": 0.0}
SMALL_VALUE |= {"warmup_updates": 1, "output": "logit"}


@dataclass(frozen=True, kw_only=True)
class DoubleValue(ValueModel):
    """A value model in float64."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> ValueReward:
        return ValueModel.load(self, device, "float64")


GRAPHS = ("all", "blocks", "inputs")
POLICY_GRADIENTS = (FlowGRPO(), DanceGRPO(), MixGRPO(window=2, shift_every=1, tail_share=0.5), FlowDPPO())
POLICY_GRADIENTS += (DiffusionNFT(most_decay=0.5, decay_growth=0.2), AWM(num_times=2))
METHODS = (LeapAlign(), ReFL(), DRaFT(num_last_steps=2), DRaFTLV(), DRTune(), AlignProp())
METHODS += (FlowBPSparse(step_draws="per-sample"), FlowBPBridge(num_training_steps=3), FlowBPLagrange(), RSM())

# Sharded, these go where other cases go: LeapAlign, FlowBP Sparse, Flow-GRPO, DiffusionNFT, and one graph.
SLOW = {f"full {m.name}" for m in METHODS if not isinstance(m, (LeapAlign, FlowBPSparse))}
SLOW |= {f"full {m.name}" for m in POLICY_GRADIENTS if not isinstance(m, (FlowGRPO, DiffusionNFT))}
SLOW |= {f"full, {what}, {graph}" for what in ("own draws", "anchored, gathered") for graph in ("all", "blocks")}
SLOW |= {"full, own draws, draft-k", "full, own draws, draft-lv", "full, lora, flow-grpo", "full, blocks"}


def numbers(engine: loop.Engine, steps: int) -> dict[str, Any]:
    """After some updates: metrics, and the last gradients, weights and averages, whole."""
    metrics = [update(engine, step) for step in range(steps)]
    metrics.append(fixed_set.evaluate(engine))
    tensors = {}
    for name, p in engine.parameters.items():
        tensors[f"weight {name}"] = whole(p.detach()).clone()
        tensors[f"average {name}"] = whole(engine.ema.shadow[name]).clone()
        if p.grad is not None:
            tensors[f"gradient {name}"] = whole(p.grad).clone()
    return {"metrics": metrics, "tensors": tensors}


def deviation(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference; infinite where one has what the other lacks."""
    if found["tensors"].keys() != expected["tensors"].keys():
        return float("inf")
    worst = max(float((t - expected["tensors"][n]).abs().max()) for n, t in found["tensors"].items())
    for ours, theirs in zip(found["metrics"], expected["metrics"]):
        if ours.keys() != theirs.keys():
            return float("inf")
        tables = [metrics.pop(BY_STEPS, {}) for metrics in (ours, theirs)]
        if not same_table(*tables):
            return float("inf")
        worst = max([worst, *(abs(ours[k] - theirs[k]) / max(1, abs(theirs[k])) for k in ours)])
    return worst


def same_table(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> bool:
    """Equal columns, but for the last of four digits."""
    return ours.keys() == theirs.keys() and all(
        len(a) == len(theirs[name]) and all(abs(x - y) <= 1e-3 * abs(y) for x, y in zip(a, theirs[name]))
        for name, a in ours.items()
    )


def compared(
    run: Run, world: World, steps: int = 2, note: Callable[[loop.Engine], dict[str, Any]] = lambda _: {}
) -> dict[str, Any]:
    """The run on all ranks against the same on one; every rank compares for itself."""
    expected = numbers(loop.build(run, World()), steps)
    engine = loop.build(run, world)
    found = numbers(engine, steps)
    moved = max(float(t.abs().max()) for n, t in expected["tensors"].items() if n.startswith("gradient"))
    return {"deviation": max(world.gather(deviation(found, expected))), "gradient": moved} | note(engine)


# The held-out reward rises and falls: the run ends, and exports the average of a step in between.
ENDING: dict[str, Any] = {"steps": 40, "evaluate_every": 1, "checkpoint_every": 3, "stop_when": StopWhen(evaluations=3)}


def ended(run: Run, world: World) -> dict[str, Any]:
    """Train until all ranks are killed after step 7, then resume."""

    def kill(metrics: Any) -> None:
        if metrics["step"] == 7:
            raise KeyboardInterrupt

    try:
        loop.train(run, on_step=kill)
    except KeyboardInterrupt:
        dist.barrier()
    summary = loop.train(run, resume=True).summary
    return {key: summary.get(key) for key in ("steps", "exported", "stopped")}


def cases(folder: Path, world: World) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    small = replace(
        tiny(), model=TinyModel(double=True), batch_size=8, micro_batch_size=1, evaluation_size=5, sharding="replicate"
    )
    small = replace(small, prompts=replace(small.prompts, path=str(folder / "prompts.txt")))
    real = replace(
        small,
        model=GuidedSD3(),
        num_sampling_steps=3,
        seed=1,  # AlignProp's draws: no gradient in the first update, one in the second
        batch_size=4,
        evaluation_size=3,
        learning_rate=1e-3,
    )
    full, lora = replace(real, sharding="full"), replace(real, tuning=LoRA(rank=2, init="gaussian"), learning_rate=1e-2)
    few = (RewardTerm(reward=TinyReward(), threshold=_between(small)),)
    named: dict[str, Callable[[], dict[str, Any]]] = {}
    for method in METHODS:
        held = {"method": method, "anchor_weight": 20.0 if isinstance(method, NeedsAnchor) else 0.0}
        named[f"replicate {method.name}"] = lambda h=held: compared(replace(small, **h), world, 3)
        named[f"full {method.name}"] = lambda h=held: compared(replace(full, **h), world)
    for method in POLICY_GRADIENTS:
        grouped: dict[str, Any] = {"method": method, "samples_per_prompt": 4}
        in_parts = {"updates_per_rollout": 2, "checkpoint_every": 2}
        if isinstance(method, DiffusionNFT):
            grouped, in_parts = grouped | {"ema_decay": 0.0}, {}
        named[f"replicate {method.name}"] = lambda g=grouped | in_parts: compared(replace(small, **g), world, 3)
        named[f"full {method.name}"] = lambda g=grouped: compared(replace(full, **g), world)
    named["full, lora, flow-grpo"] = lambda: compared(
        replace(lora, sharding="full", method=FlowGRPO(guard=True), samples_per_prompt=2), world
    )
    apart = replace(small, samples_per_draw=1)
    named["replicate, a draw a sample"] = lambda: compared(replace(apart, method=AlignProp()), world, 3)
    named["replicate, some above the threshold"] = lambda: compared(replace(small, rewards=few), world, 1)
    named["full, some above the threshold"] = lambda: compared(replace(small, rewards=few, sharding="full"), world, 1)
    named["replicate, real"] = lambda: compared(real, world)
    named["replicate, lora"] = lambda: compared(lora, world)
    named["full, lora"] = lambda: compared(replace(lora, sharding="full"), world)
    named["full, gathered"] = lambda: compared(replace(full, gather_in_rollout=True), world)
    for graph in ("inputs", "blocks"):
        named[f"full, {graph}"] = lambda g=graph: compared(replace(full, graph=g), world, 1)
    own = replace(full, samples_per_draw=1, num_sampling_steps=4)  # another (k, j) on each rank
    for graph in GRAPHS:
        named[f"full, own draws, {graph}"] = lambda g=graph: compared(replace(own, graph=g), world, 3)
    for method in (DRaFT(num_last_steps=2), DRaFTLV()):
        named[f"full, own draws, {method.name}"] = lambda m=method: compared(replace(own, method=m), world)
    pairs = LeapAlign(pairs_per_rollout=2, step_draws="stratified")
    held = {"method": pairs, "anchor_weight": 20.0}
    for name, run, steps in (("replicate", small, 3), ("replicate, real", real, 2), ("full", full, 2)):
        named[f"{name}, anchored pairs"] = lambda r=run, n=steps: compared(replace(r, **held), world, n)
    reused = replace(full, updates_per_rollout=2, **held)
    named["full, rollouts used again"] = lambda: compared(reused, world, 4)
    for name, run in (("replicate", small), ("full", full)):
        skipping = replace(run, rewards=few, skip_satisfied=True, **held)
        named[f"{name}, satisfied samples skipped"] = lambda r=skipping: compared(r, world, 2)
    held_lora = replace(lora, sharding="full", **held)
    named["full, lora, anchored pairs"] = lambda: compared(held_lora, world)
    means = {"anchor_weight": 20.0, "anchor_mean_weight": 60.0}
    named["replicate, mean of the batch"] = lambda: compared(replace(small, method=AlignProp(), **means), world, 3)
    several = replace(full, method=pairs, updates_per_rollout=2, **means)
    named["full, mean of the batch"] = lambda: compared(several, world, 3)
    for graph in GRAPHS:
        anchored = replace(full, anchor_weight=20.0, gather_in_rollout=True, graph=graph)
        named[f"full, anchored, gathered, {graph}"] = lambda r=anchored: compared(r, world, 3)
    for sharding in ("replicate", "full"):
        watched = replace(small, monitors=MONITORS, sharding=sharding)
        named[f"{sharding}, monitors"] = lambda r=watched: compared(r, world, 1)
        ending = replace(watched, out=str(folder / f"run-ended-{sharding}"), **ENDING)
        named[f"{sharding}, ended by its rule"] = lambda r=ending: ended(r, world)
    named["whole at a time"] = lambda: {g: whole_at_a_time(replace(full, graph=g), world) for g in GRAPHS}
    named["hybrid"] = lambda: compared(replace(real, sharding="hybrid", shard_ranks=max(1, world.size // 2)), world)
    halves = {"shard_ranks": max(1, world.size // 2), "async_checkpoints": False}
    for sharding, changes in {"replicate": {}, "full": {}, "hybrid": halves}.items():
        run = replace(small, sharding=sharding, out=str(folder / f"run-{sharding}"), **changes)
        run = replace(run, steps=2, checkpoint_every=1)
        named[f"{sharding}, trained"] = lambda r=run: trained(r, world)
        named[f"{sharding}, NaN on one rank"] = lambda r=run: spoilt(r, world)
    killed = replace(small, sharding="full", out=str(folder / "run-killed"))
    named["full, killed in a save"] = lambda: killed_in_a_save(killed, world)
    terms = networks(folder, world)
    large = tuple(term.reward.name for term in terms)
    judged = replace(small, rewards=terms, shard_rewards=large, micro_batch_size=2, reward_chunk=1, evaluation_size=3)
    judged = replace(judged, batch_size=2 * world.size)
    named["sharded rewards"] = lambda: compared(judged, world, 1, shares)
    learnt = RewardTerm(reward=DoubleValue(of=Toward(target=0.7), **SMALL_VALUE), threshold=3.0)
    for sharding in ("replicate", "full"):
        learning = replace(small, rewards=(learnt,), sharding=sharding)
        named[f"{sharding}, value model"] = lambda r=learning: compared(r, world, 3)
    units = tuple(replace(term, unit_gradient=True) for term in terms[:2])
    both = replace(judged, rewards=units, sharding="full", shard_rewards=large[1:2])
    named["full, sharded rewards"] = lambda: compared(both, world)
    named["sharded text encoders"] = lambda: encoded(folder, world)
    for way in ("shared", "apart", "memory", "sharded"):
        named[f"prompts, {way}"] = lambda w=way: encoded_once(folder, world, w)
    named["gathered in bfloat16"] = lambda: gathered_in_bfloat16(folder, world)
    named["prompts, a rank that fails"] = lambda: encoder_fails(folder, world)
    for way in ("full", "hybrid", "auto"):
        named[f"read by rank 0, {way}"] = lambda w=way: read_by_rank_0(folder, world, FULL, "float32", w)
    named["read by rank 0, lora"] = lambda: read_by_rank_0(folder, world, LoRA(rank=2), "bfloat16", "full")
    named["another model on rank 0"] = lambda: another_model(world)
    stopping = replace(small, out=str(folder / "run-stopped"))
    named["a signal to the last rank"] = lambda: stopped(stopping, world)
    named["saved"] = lambda: saved(folder, full, world)
    return named


def whole_at_a_time(run: Run, world: World) -> int:
    """The largest number of FSDP2's groups (blocks, and the rest) that are whole when a block has run."""
    engine, found = loop.build(run, world), 0
    policy = engine.model.policy
    blocks = {name: m for name, m in policy.named_modules() if name and isinstance(m, FSDPModule)}
    rest = next(n for n, _ in policy.named_parameters() if not n.startswith(tuple(blocks)))
    names = [next(f"{block}.{n}" for n, _ in m.named_parameters()) for block, m in blocks.items()] + [rest]

    def look(*_: Any) -> None:
        nonlocal found
        weights = dict(policy.named_parameters())
        found = max(found, sum(not isinstance(weights[name], DTensor) for name in names))

    for block in blocks.values():
        block.register_forward_hook(look)
    direct.update(engine, 0)
    assert found and len(names) == 3, (found, names)
    return found


def trained(run: Run, world: World) -> dict[str, Any]:
    """Some steps by `train`; where the folder has a checkpoint (of another number of ranks), the steps after it."""
    found = (Path(run.out) / "run.json").exists()
    result = loop.train(replace(run, steps=4) if found else run, resume=found, allow_changes=found)
    return {"step": result.summary["steps"] if world.main else 0, "silent": world.main or not result.summary}


def killed_in_a_save(run: Run, world: World) -> dict[str, Any]:
    """All ranks save in children, one of which is killed at its n-th fsync or rename; then the newest is restored."""
    engine = loop.build(run, world)
    state = (engine.parameters, engine.ema.shadow, engine.optimizer)
    writers = sharded.writers_of(engine.parameters, world)
    Path(run.out, "checkpoints").mkdir(parents=True, exist_ok=True)
    taken = {}
    for step in (1, 2):
        direct.update(engine, step)
        snapshot = checkpoints.take(run, Progress(step=step), *state, writers)
        taken[step] = replace(snapshot, tensors=Copies().of(snapshot.tensors))
    checkpoints.save(taken[1])
    dist.barrier()
    steps, equal = [], True
    for victim, stride in {1: 2, 0: 5}.items():
        for moment in range(0, 100, stride):
            copied = replace(run, out=str(Path(run.out).with_name(f"killed-{victim}-{moment}")))
            if world.main:
                shutil.copytree(run.out, copied.out)
            dist.barrier()
            status = save_and_die(replace(taken[2], run=copied), moment if world.rank == victim else -1)
            killed = any(world.gather(status))
            origin = world.from_main(checkpoints.find(copied) if world.main else None)
            assert origin, (victim, moment)
            progress = checkpoints.restore(origin, *state)
            expected = taken[progress.step].tensors
            for group, named in checkpoints.take(copied, progress, *state, writers).tensors.items():
                equal = equal and all(torch.equal(t, expected[group][name]) for name, t in named.items())
            steps.append((victim, killed, progress.step))
            dist.barrier()
            if not killed:
                break
    return {"steps": steps, "equal": all(world.gather(equal))}


def save_and_die(snapshot: checkpoints.Snapshot, moment: int) -> int:
    """The child's status: not 0 where it was killed, or gave up because another one was."""
    pid = os.fork()
    if pid == 0:
        left = [moment]

        def counted(call: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)

            return wrapper

        for name in ("fsync", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        sharded.PATIENCE = 1.0
        try:
            checkpoints.save(snapshot)
        except RunStopped:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def spoilt(run: Run, world: World) -> dict[str, Any]:
    """The reward of the first prompt is NaN: some rank meets it first, and all of them stop in the same step."""
    engine = loop.build(replace(run, rewards=(RewardTerm(reward=TinyReward(spoil="red"), threshold=2.0),)), world)
    try:
        for step in range(3):
            direct.update(engine, step)
        said: tuple[Any, ...] = ("nothing",)
    except NotFinite as error:
        said = (str(error).split(". ")[0], error.elsewhere)
    every = world.gather(said)
    return {"texts": sorted({words[0] for words in every}), "said by": sum(not words[-1] for words in every)}


def stopped(run: Run, world: World) -> dict[str, Any]:
    """SIGUSR1, as Slurm sends it before the end of the time, reaches one rank only."""

    def send(metrics: Any) -> None:
        if world.rank == world.size - 1 and metrics["step"] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        loop.train(run, on_step=send)
        status, elsewhere = 0, False
    except RunInterrupted as end:
        status, elsewhere = end.status, end.elsewhere
    checkpoint = Path(run.out) / "checkpoints" / "step-000001" / "state.json"
    return {
        "status": world.gather(status),
        "saved": checkpoint.exists(),
        "said by": world.gather(elsewhere).count(False),
    }


def saved(folder: Path, run: Run, world: World) -> dict[str, Any]:
    """The real classes in float32, sharded: checked at the start and at the first save, and left as a pipeline."""
    if world.main:
        tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=False), folder / "sd3")
    dist.barrier()
    model = SD3(path=str(folder / "sd3"), height=8, width=8, guidance_scale=3.0, max_sequence_length=0)
    run = replace(run, model=model, steps=1, evaluate_every=0, out=str(folder / "run-saved"))
    result = loop.train(run)
    shadow = {name: whole(t) for name, t in result.engine.ema.shadow.items()}
    dist.barrier()
    written = load_tensors(result.pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    equal = written.keys() >= shadow.keys() and all(torch.equal(written[name], t) for name, t in shadow.items())
    parts = sum(p.to_local().numel() for p in result.engine.parameters.values())  # type: ignore[attr-defined]
    return {"equal": equal, "share": parts / sum(t.numel() for t in shadow.values())}


def share(network: torch.nn.Module) -> float:
    """Of a network's weights, what this rank holds."""
    ps = list(network.parameters())
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in ps) / sum(p.numel() for p in ps)


def shares(engine: loop.Engine) -> dict[str, Any]:
    """Of each reward's blocks, and of all of it."""
    networks = {name: reward.reward.model for name, reward in engine.rewards.items()}  # type: ignore[attr-defined]
    blocks = {
        name: [share(block) for block in fsdp_frozen.blocks_of(network, name)] for name, network in networks.items()
    }
    return {"blocks": blocks, "whole": {name: share(network) for name, network in networks.items()}}


def read_by_rank_0(folder: Path, world: World, tuning: Any, dtype: str, sharding: str) -> dict[str, Any]:
    """Against the same model, read by this rank itself. `auto`: sharding is possible, but the policy is small."""
    config = sd3_with_t5(folder, world)
    run = replace(tiny(), model=config, sharding=sharding, tuning=tuning, shard_ranks=max(1, world.size // 2))
    alone = config.load("cpu", dtype, tuning)
    tuning.initialise(alone.policy, run.seed)
    device = "cuda" if sharding == "auto" else "cpu"
    model = config.load("cpu", dtype, tuning, broadcast.loading(run, world, device))
    tuning.initialise(model.policy, run.seed)
    empty = all(p.is_meta for n, p in model.policy.named_parameters() if "lora" not in n)
    shards = broadcast.spread(run, model.policy, world, "cpu")
    equal = model.policy.state_dict().keys() == alone.policy.state_dict().keys()
    ours, theirs = (dict(m.policy.named_parameters()) | dict(m.policy.named_buffers()) for m in (model, alone))
    for name, t in theirs.items():
        mine = ours[name]
        equal = equal and mine.dtype == t.dtype and mine.requires_grad == t.requires_grad
        equal = equal and torch.equal(whole(mine.detach()), t.detach())
    noise = model.noise([torch.Generator().manual_seed(0)])
    text = alone.encode(["red"])
    v, expected = (m.velocity(text)(noise, torch.tensor(0.5)).detach() for m in (model, alone))
    return {
        "equal": all(world.gather(equal)),
        "velocity": float((v - expected).abs().max()),
        "empty": world.gather(empty),
        "sharded": shards is not None,
    }


def another_model(world: World) -> dict[str, Any]:
    """Rank 0 has read other shapes than the others expect."""
    with torch.device("cpu" if world.main else "meta"):
        policy = torch.nn.Linear(2, 2 if world.main else 3)
    try:
        broadcast.spread(replace(tiny(), sharding="full"), policy, world, "cpu")
    except UserError as error:
        return {"says": world.gather(str(error))}
    return {"says": []}


def encoded(folder: Path, world: World) -> dict[str, Any]:
    """CLIP and T5 with sharded blocks, where rank 0 has two of the prompts already; and encoders loaded afterwards."""
    config = sd3_with_t5(folder, world)
    model, alone = config.load("cpu", "float32"), config.load("cpu", "float32")
    if world.main:
        model.prepare(PROMPTS[:2])
    held, spread = [], rank_prompts.shard_blocks
    rank_prompts.shard_blocks = lambda blocks, mesh: (spread(blocks, mesh), held.append(blocks))
    rank_prompts.prepare(replace(tiny(), shard_text_encoders=True), model, [PROMPTS] * world.size, world, "cpu")
    rank_prompts.shard_blocks = spread
    alone.prepare(PROMPTS)
    ours, theirs = model.encode(PROMPTS).prompts, alone.encode(PROMPTS).prompts
    assert ours.pooled is not None and theirs.pooled is not None
    equal = torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pooled, theirs.pooled)
    if world.main:
        model.encode(["a prompt that was not foreseen"])  # by rank 0 alone: its encoders are whole
    blocks = {str(i): [share(block) for block in encoder] for i, encoder in enumerate(held)}
    return {"equal": all(world.gather(equal)), "blocks": blocks}


def encoded_once(folder: Path, world: World, way: str) -> dict[str, Any]:
    """Real text encoders and an update: on all ranks, by rank the prompts encoded and written; against one process.

    `way`: one cache on disk for all ranks, one each, none, or one for all that sharded text encoders fill.
    """
    each = f"-{world.rank}" if way == "apart" else ""
    os.environ["LEAPALIGN_CACHE"] = str(folder / f"cache-{way}{each}")
    os.environ["LEAPALIGN_CACHE_GB"] = "0" if way == "memory" else "1"
    texts = folder / "many.txt"
    if world.main:
        texts.write_text("\n".join(f"{number} red circles" for number in range(80)))
    dist.barrier()
    run = replace(tiny(), model=sd3_with_t5(folder, world), batch_size=40, micro_batch_size=10, steps=1)
    run = replace(run, prompts=replace(run.prompts, path=str(texts)), evaluation_size=2, num_sampling_steps=2)
    run = replace(run, shard_text_encoders=way == "sharded", sharding="replicate")
    log: dict[str, list[str]] = {"encoded": [], "written": []}
    with patched(prompt_store, "WORTHWHILE", 0), noted(log):
        engine = loop.build(run, world)
        counts = world.gather({name: len(set(prompts)) for name, prompts in log.items()})
        once = len(log["encoded"]) == len(set(log["encoded"])) and len(log["written"]) == len(set(log["written"]))
        metrics = direct.update(engine, 0)
        later = world.gather(len(log["encoded"]) - counts[world.rank]["encoded"])
    os.environ["LEAPALIGN_CACHE_GB"] = "0"
    expected = direct.update(loop.build(replace(run, shard_text_encoders=False), World()), 0)
    files = len(list((folder / f"cache-{way}{each}").glob("*/*.safetensors")))
    return {
        "needed": world.gather(len(batches.prompts_used(run, engine.prompts, rank=world.rank, ranks=world.size))),
        "all": len(batches.prompts_used(run, engine.prompts)),
        "counts": counts,
        "once": all(world.gather(once)),
        "later": later,
        "files": world.gather(files),
        "departs": max(abs(metrics[name] - expected[name]) for name in ("loss", "reward", "grad_norm")),
    }


def gathered_in_bfloat16(folder: Path, world: World) -> dict[str, Any]:
    """Two updates by float32 gathers and by bfloat16 ones: losses, and the dtypes of weights in a block's forward."""
    run = replace(tiny(), model=sd3_with_t5(folder, world), dtype="bfloat16", sharding="full", micro_batch_size=1)
    run = replace(run, batch_size=2 * world.size, samples_per_draw=1, num_sampling_steps=3, evaluation_size=1)
    found: dict[str, Any] = {}
    for kind in ("float32", "bfloat16"):
        engine, seen = loop.build(replace(run, gather_dtype=kind), world), set()
        block = engine.model.policy.transformer_blocks[0]
        block.attn.register_forward_pre_hook(lambda m, *_, s=seen: s.update(str(p.dtype) for p in m.parameters()))
        losses = [direct.update(engine, step)["loss"] for step in range(2)]
        held = [t for p in engine.parameters.values() for t in (p, p.grad) if t is not None]
        kept = {str(t.dtype) for t in held}
        found[kind] = {"losses": losses, "gathered": sorted(seen), "kept": sorted(kept)}
    return found


def encoder_fails(folder: Path, world: World) -> dict[str, Any]:
    """The last rank's text encoders fail in their second call."""
    os.environ["LEAPALIGN_CACHE_GB"] = "0"
    model, calls = sd3_with_t5(folder, world).load("cpu", "float32"), []

    def fails(prompts: list[str]) -> Any:
        calls.append(prompts)
        if len(calls) == 2 and world.rank == world.size - 1:
            raise UserError("the text encoders are gone")
        return model.load_encoder(FROM_FILES)(prompts)

    model.prompts._load_encoder = lambda: fails
    try:
        reached = [[f"{rank} {number}" for number in range(40)] for rank in range(world.size)]
        rank_prompts.prepare(tiny(), model, reached, world, "cpu")
    except UserError as error:
        return {"says": world.gather(str(error)), "calls": world.gather(len(calls))}
    return {"says": [], "calls": []}


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def noted(log: dict[str, list[str]]) -> Iterator[None]:
    """Inside, the prompts that this process encodes, and those whose entries it writes, are appended."""
    encode, write = PromptCache._encode, PromptStore.write

    def encoding(cache: PromptCache, prompts: list[str], *rest: Any, **named: Any) -> None:
        log["encoded"] += prompts
        encode(cache, prompts, *rest, **named)

    def writing(store: PromptStore, prompt: str, row: Any) -> None:
        log["written"].append(prompt)
        write(store, prompt, row)

    with patched(PromptCache, "_encode", encoding), patched(PromptStore, "write", writing):
        yield


def _between(run: Run) -> float:
    """A threshold above some of the first batch's rewards and below others."""
    engine = loop.build(run, World())
    rewards = []
    for micro in batches.micro_batches(run, engine.prompts, 0):
        (surrogate,) = direct.roll_out(engine, micro, engine.velocity(micro.prompts))
        rewards.append(float(direct.gradient_at_latent(engine, micro, surrogate).reward[0]))
    rewards.sort()
    return (rewards[0] + rewards[1]) / 2  # one sample of one rank trains


def main(folder: Path, only: str) -> None:
    """The cases whose names contain `only`; "": all of them; "quick": all but the slow ones, which are then listed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    dist.barrier()
    with joined(tiny_for(dist.get_world_size())) as world:
        named, left = cases(folder, world), SLOW if only == "quick" else set()
        assert left <= named.keys()
        answers: dict[str, Any] = {"left to the slow tests": sorted(left)}
        for name, case in named.items():
            if name in left or (only != "quick" and only not in name):
                continue
            begun = time.monotonic()
            answers[name] = case() | {"seconds": time.monotonic() - begun}
    if rank == 0:
        (folder / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def tiny_for(ranks: int) -> Run:
    return replace(tiny(), batch_size=2 * ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:3]))

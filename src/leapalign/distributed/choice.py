"""Decide whether a run's policy is sharded over its ranks, and check that each rank's share fits its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from leapalign.distributed.rank_rules import unequal_forwards
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.models.prompt_embeds.location import gigabytes
from leapalign.run import Run
from leapalign.tuning.quantization import Quantised

ROOM = 0.4  # share of a device's memory for weights, gradients, optimiser and average; above it, `auto` shards
QUANTISED = "a quantised base cannot be sharded; use --sharding replicate, or an unquantised base"
KEPT = 20  # bytes of a trained weight: float32 weight, gradient, two moments, average


def may_shard(run: Run, world: World, device: str) -> bool:
    """Return, before the policy is loaded, True if it is sharded or if its size will decide."""
    if world.size == 1 or run.sharding == "replicate":
        return False
    return run.sharding != "auto" or (device.startswith("cuda") and not unequal_forwards(run, world))


@dataclass(frozen=True)
class Choice:
    """The decision to shard the policy or not; for `auto` with the reason, as a sentence for the user."""

    sharded: bool
    why: str = ""


def choose(run: Run, policy: nn.Module, world: World, device: str, memory: int = 0) -> Choice:
    """Resolve `run.sharding` for this policy on these ranks.

    `auto` shards on CUDA if replicated weights, gradients, optimiser and average would take more than ROOM of a device,
    and if all ranks make equally many forwards.
    `memory`: bytes of the device; 0 = ask it.
    """
    if run.sharding != "auto" or world.size == 1:
        return Choice(may_shard(run, world, device))
    if not device.startswith("cuda"):
        return _replicate("the ranks compute on CPUs")
    if why := unequal_forwards(run, world):
        return _replicate(f"{why} (samples_per_draw {run.micro_batch_size * world.size}, or 0, would be)")
    if isinstance(policy, Quantised):
        return _replicate("a quantised base cannot be sharded")
    kept, there = kept_bytes(policy), memory or memory_of(device)
    share = f"{gigabytes(kept)} of {gigabytes(there)} of memory"
    if kept <= ROOM * there:
        return _replicate(f"weights, gradients, optimiser and average take {share}")
    return Choice(True, f"sharding auto: full, because replicated weights, optimiser and average would take {share}")


def _replicate(why: str) -> Choice:
    return Choice(False, f"sharding auto: replicate, because {why}")


def check_fits(run: Run, policy: nn.Module, world: World, device: str, memory: int = 0) -> None:
    """Raise UserError if weights, gradients, optimiser and average exceed the memory of a rank's device.

    `memory`: bytes of the device; 0 = ask it. CPUs are not checked.
    """
    if not device.startswith("cuda"):
        return
    there, sharded = memory or memory_of(device), choose(run, policy, world, device, memory).sharded
    kept = kept_bytes(policy, shared_by(run, world) if sharded else 1)
    if kept > there:
        raise UserError(
            f"{device} has {gigabytes(there)} of memory; weights, gradients, optimiser and average of the model take "
            f"{gigabytes(kept)} on each rank; use {', or '.join(_ways_to_fit(run, policy, world, sharded, there))}"
        )


def _ways_to_fit(run: Run, policy: nn.Module, world: World, sharded: bool, memory: int) -> list[str]:
    others = ["a recipe that trains a LoRA", "a smaller model"]
    trained, frozen = _trained_and_frozen(policy)
    if isinstance(policy, Quantised) or (frozen and trained >= memory):
        return others
    needed = -(-frozen // (memory - trained)) if frozen else -(-trained // memory)
    if world.size < needed:
        return [f"{needed} ranks or more with --sharding full", *others]
    if sharded:
        return [f"--sharding full, or --shard-ranks {needed} or more", *others]
    obstacle = unequal_forwards(run, world)
    return [f"--sharding full ({obstacle}: mend that first)" if obstacle else "--sharding full", *others]


def kept_bytes(policy: nn.Module, among: int = 1) -> int:
    """Bytes of the policy on each rank for the whole run: weights, gradients, moments and average.

    `among`: ranks that share one copy. If some weights are frozen (LoRA), the trained ones stay whole on every rank.
    """
    trained, frozen = _trained_and_frozen(policy)
    return trained + frozen // among if frozen else trained // among


def _trained_and_frozen(policy: nn.Module) -> tuple[int, int]:
    """Bytes of the trained weights with gradients, moments and average, and bytes of the frozen weights."""
    weights = list(policy.parameters())
    trained = KEPT * sum(p.numel() for p in weights if p.requires_grad)
    return trained, sum(p.numel() * p.element_size() for p in weights if not p.requires_grad)


def memory_of(device: str) -> int:
    """Bytes of a CUDA device's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def shared_by(run: Run, world: World) -> int:
    """Number of ranks that share one copy of sharded weights. Raises UserError if it does not divide the world size."""
    inner = (run.shard_ranks or world.local_size) if run.sharding == "hybrid" else world.size
    if world.size % inner:
        raise UserError(f"{world.size} ranks cannot be divided into groups of {inner}; set shard_ranks")
    return inner

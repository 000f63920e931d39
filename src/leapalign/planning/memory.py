"""Device memory of one rank: constant from the first update on, and the peak of each phase of an update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from leapalign.distributed.fsdp import repeated_blocks
from leapalign.distributed.fsdp_frozen import blocks_of
from leapalign.distributed.world import BUCKET
from leapalign.methods.base import ClipsGradients
from leapalign.methods.policy_gradient import PolicyGradient
from leapalign.models.pipeline import parse_dtype
from leapalign.planning.activations import GraphBytes, latent_bytes
from leapalign.planning.components import Planned, quantization_of
from leapalign.planning.forwards import Forwards
from leapalign.planning.rewards import RewardPlan
from leapalign.planning.sharding import ALONE, Rank, bytes_of, largest_gathered
from leapalign.training.reference import CAST

FLOAT32 = 4  # bytes
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5}  # bytes a weight


def always(planned: Planned) -> dict[str, int]:
    """Component -> bytes that are allocated in every phase, from the first update on."""
    trained = trained_bytes(planned, planned.rank)
    beside = planned.run.base_copy == "device" or planned.device == "cpu"
    return {
        "transformer": policy_bytes(planned, planned.rank),
        "optimiser (AdamW, two moments)": 2 * trained,
        "average (EMA, float32)": trained,
        **({"base of anchor and drift": reference_bytes(planned)} if _has_base(planned) and beside else {}),
        "VAE (float32)": bytes_of(planned.model.decoder.vae.parameters()),
        "rewards": sum(_reward_bytes(planned.rank, plan, blocks) for plan, blocks in rewards_here(planned)),
    } | _held_out(planned)


def _has_base(planned: Planned) -> bool:
    from leapalign.training.engine import needs_base

    return needs_base(planned.run)


def _held_out(planned: Planned) -> dict[str, int]:
    """Bytes of the held-out rewards on the run's device; nothing without any."""
    terms = planned.run.monitors.held_out
    here = [plan.bytes for plan, term in zip(planned.held_out, terms) if not term.device]
    return {"held-out rewards": sum(here)} if here else {}


def trained_bytes(planned: Planned, rank: Rank = ALONE) -> int:
    """Bytes of the trained weights, which are float32, on this rank."""
    return rank.policy(planned.model.policy, trained=True)


def reference_bytes(planned: Planned) -> int:
    """Bytes of the anchor's base: a copy of the trained weights (leapalign.training.reference)."""
    policy = planned.model.policy
    if planned.rank.sharded and all(p.requires_grad for p in policy.parameters()):  # shards stay float32
        return trained_bytes(planned, planned.rank)
    return _base_bytes(planned, policy.parameters())


def base_in_forward(planned: Planned) -> int:
    """Return the device's bytes of a base in CPU memory while it computes: its largest block, and all but the blocks.

    0 if the base stays on the device.
    """
    if planned.run.base_copy == "device" or not _has_base(planned):
        return 0
    policy = planned.model.policy
    blocks = [list(block.parameters()) for block in repeated_blocks(policy)]
    inside = {id(p) for block in blocks for p in block}
    largest = max((_base_bytes(planned, block) for block in blocks), default=0)
    return largest + _base_bytes(planned, [p for p in policy.parameters() if id(p) not in inside])


def _base_bytes(planned: Planned, weights: Iterable[nn.Parameter]) -> int:
    """Bytes of the base's copies of whole weights; frozen ones have none."""
    policy, trained = planned.model.policy, [p for p in weights if p.requires_grad]
    cast = [module for module in policy.modules() if isinstance(module, CAST) and planned.run.dtype != "float32"]
    half = {id(p) for layer in cast for p in layer.parameters(recurse=False)}
    return bytes_of(trained) - bytes_of(p for p in trained if id(p) in half) // 2


def policy_bytes(planned: Planned, rank: Rank = ALONE) -> int:
    policy, quantization = planned.model.policy, quantization_of(planned.run)
    total = rank.policy(policy, trained=False) + bytes_of(policy.buffers())
    if not quantization:
        return total
    linear = [m.weight for m in policy.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    scales = sum(len(w) if quantization == "int8" else math.ceil(w.numel() / 64) for w in linear)
    quantised = int(QUANTISED_BYTES[quantization] * sum(w.numel() for w in linear)) + FLOAT32 * scales
    return total - bytes_of(linear) + quantised


def rewards_here(planned: Planned) -> Iterator[tuple[RewardPlan, Sequence[nn.Module]]]:
    """Yield the rewards on the run's device, each with its sharded blocks."""
    from leapalign.training.engine import reward_names

    for name, plan, term in zip(reward_names(planned.run), planned.rewards, planned.run.rewards):
        sharded = name in planned.run.shard_rewards and planned.rank.world.size > 1
        network = plan.network if sharded else None
        if not term.device:
            yield plan, () if network is None else blocks_of(network, f"shard_rewards: the reward {name}")


def _reward_bytes(rank: Rank, plan: RewardPlan, blocks: Sequence[nn.Module]) -> int:
    return rank.frozen(plan.network, blocks) if blocks else plan.bytes


def reward_bytes(planned: Planned, forwards: Forwards) -> int:
    """Return the peak bytes of decoding and scoring one chunk and of its gradient."""
    run = planned.run
    rows = run.micro_batch_size * forwards.copies
    here = list(rewards_here(planned))
    scores: list[Any] = [plan.score for plan, _ in here if plan.score]
    return latent_bytes(
        planned.model,
        planned.mode,
        min(run.reward_chunk or rows, rows),
        lambda images: [images, *(score(images) for score in scores)],
        gradient=not isinstance(run.method, PolicyGradient),
    ) + max((largest_gathered(blocks) for _, blocks in here), default=0)


def waiting_bytes(planned: Planned, forwards: Forwards, graph: GraphBytes) -> int:
    """Return the bytes of micro-batches that wait for their backward while others are rolled out and scored.

    Only where they need the whole batch first: states and velocities of the rollout, x_0 with its gradient; for the
    anchor's mean also the differences from the base, and what the graph keeps.
    """
    run, ranks = planned.run, planned.rank.world.size
    means = run.waits_for_mean(ranks)
    if not isinstance(run.method, ClipsGradients) and not means:
        return 0
    numbers = run.micro_batch_size * math.prod(planned.model.latent_shape)
    latents = 2 * forwards.in_backward + 2 + (forwards.held(run.anchor_states) if means else 0)
    others = run.batch_size // (run.micro_batch_size * ranks) - 1
    return others * (latents * numbers * FLOAT32 + (graph.kept if means else 0))


def phases(planned: Planned, *, graph: GraphBytes, forward: int, reward: int, waiting: int) -> dict[str, int]:
    """Phase -> peak bytes. `graph`: of one micro-batch; the others: results of the functions NAME_bytes."""
    run, rank, policy, memory = planned.run, planned.rank, planned.model.policy, always(planned)
    fixed, trained = sum(memory.values()), trained_bytes(planned, rank)
    accumulated = run.batch_size > run.micro_batch_size * rank.world.size
    if isinstance(run.method, PolicyGradient):  # a batch is rolled out before any of it is trained
        held = waiting = graph.kept * (run.batch_size // (run.micro_batch_size * rank.world.size) - 1)
    else:
        held = waiting + (trained if accumulated else 0)  # gradients of earlier micro-batches
    in_forward, in_backward = rank.gathered(policy)
    in_rollout = max(in_forward, policy_bytes(planned)) if rank.sharded and run.gather_in_rollout else in_forward
    largest = rank.largest(policy)
    base = base_in_forward(planned)  # inside a rollout, or a backward that recomputes
    exchanged = BUCKET + largest if rank.world.size > 1 and not rank.sharded else 0  # gradients, flat
    return {
        "encoding prompts": memory["transformer"] + memory["VAE (float32)"] + _text_bytes(planned),
        "rollout": fixed + held + in_rollout + base + graph.rollout,
        "decode and reward": fixed + held + graph.kept + reward,
        "backward": fixed + waiting + trained + in_backward + base + graph.backward,
        "optimiser step": fixed + trained + max(2 * largest, exchanged),  # AdamW's temporaries, one weight at a time
        "scoring the average": fixed + in_rollout + base + forward,
    }


def _text_bytes(planned: Planned) -> int:
    """Bytes of the text encoders on this rank, before they are freed."""
    text = {name: count for name, count in planned.weights.items() if name.startswith("text_encoder")}
    blocks = planned.text_blocks if planned.rank.world.size > 1 else {}
    here = sum(
        n - blocks.get(name, 0) + math.ceil(blocks.get(name, 0) / planned.rank.among) for name, n in text.items()
    )
    return here * parse_dtype(planned.run.dtype).itemsize

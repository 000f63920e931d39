"""What lies on the device: from the first update on, and at most in each phase of an update."""

from __future__ import annotations

import math

from torch import nn

from leapalign.models.pipeline import parse_dtype
from leapalign.planning.activations import Forwards, GraphBytes, latent_bytes
from leapalign.planning.parts import Parts, bytes_of, quantization_of

FLOAT32 = 4  # bytes
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5}  # of a weight


def always(parts: Parts) -> dict[str, int]:
    """Part -> bytes, from the first update on, whatever the phase."""
    here = [r.bytes for r, term in zip(parts.rewards, parts.run.rewards) if not term.device]
    return {
        "transformer": policy_bytes(parts),
        "optimiser (AdamW, two moments)": 2 * trained_bytes(parts),
        "average (EMA, float32)": FLOAT32 * parts.trained,
        "VAE (float32)": bytes_of(parts.model.decoder.vae.parameters()),
        "rewards": sum(here),
    }


def trained_bytes(parts: Parts) -> int:
    return bytes_of(p for p in parts.model.policy.parameters() if p.requires_grad)


def policy_bytes(parts: Parts) -> int:
    policy, quantization = parts.model.policy, quantization_of(parts.run)
    total = bytes_of([*policy.parameters(), *policy.buffers()])
    if not quantization:
        return total
    linear = [m.weight for m in policy.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    scales = sum(len(w) if quantization == "int8" else math.ceil(w.numel() / 64) for w in linear)
    quantised = int(QUANTISED_BYTES[quantization] * sum(w.numel() for w in linear)) + FLOAT32 * scales
    return total - bytes_of(linear) + quantised


def reward_bytes(parts: Parts, forwards: Forwards) -> int:
    """Most alive while a chunk is decoded, scored, and its gradient is taken."""
    run = parts.run
    rows = run.micro_batch_size * forwards.copies
    scores = [r.score for r, term in zip(parts.rewards, run.rewards) if r.score and not term.device]
    return latent_bytes(
        parts.model,
        parts.mode,
        min(run.reward_chunk or rows, rows),
        lambda images: [images, *(score(images) for score in scores)],
    )


def phases(parts: Parts, *, graph: GraphBytes, forward: int, reward: int) -> dict[str, int]:
    """Phase -> the most bytes alive in it. `graph`: of one micro-batch, `forward`: of one without a graph."""
    run, memory, trained = parts.run, always(parts), trained_bytes(parts)
    fixed = sum(memory.values())
    accumulated = run.batch_size > run.micro_batch_size
    held = trained if accumulated else 0  # gradients of earlier micro-batches
    text = sum(count for name, count in parts.weights.items() if name.startswith("text_encoder"))
    largest = max((bytes_of([p]) for p in parts.model.policy.parameters() if p.requires_grad), default=0)
    return {
        "encoding prompts": memory["transformer"] + memory["VAE (float32)"] + text * parse_dtype(run.dtype).itemsize,
        "rollout": fixed + held + graph.rollout,
        "decode and reward": fixed + held + graph.kept + reward,
        "backward": fixed + trained + graph.backward,
        "optimiser step": fixed + trained + 2 * largest,  # AdamW's temporaries, a weight after another
        "scoring the average": fixed + forward,
    }

"""What the benches share: the ShapeWorld recipe on other folders, a loaded batch, and what a number needs beside it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from leapalign.flow.graph import with_graph
from leapalign.flow.rollout import Velocity
from leapalign.methods.base import Surrogate
from leapalign.methods.objective import LatentGradient, latent_gradient
from leapalign.rewards.clip import PickScore
from leapalign.run import Run
from leapalign.training.batches import micro_batches, noise_generators
from leapalign.training.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One whole batch of an engine's run: prompts, noise x_T [B, ...], and the velocity bound to the prompts."""

    prompts: list[str]
    noise: Tensor
    velocity: Velocity


def with_folders(run: Run, generator: str, reward: str) -> Run:
    """The same run on another pipeline and reward folder."""
    terms = tuple(
        replace(term, reward=replace(term.reward, path=reward)) if isinstance(term.reward, PickScore) else term
        for term in run.rewards
    )
    return replace(run, model=replace(run.model, path=generator), rewards=terms)


def first_batch(engine: Engine) -> Batch:
    """Step 0's batch, as the loop makes it, with the run's setting of the graph."""
    run = engine.run
    (micro,) = micro_batches(replace(run, micro_batch_size=run.batch_size), engine.prompts, 0)
    velocity = engine.model.velocity(engine.model.encode(list(micro.prompts)))
    return Batch(
        prompts=list(micro.prompts),
        noise=engine.model.noise(noise_generators(run.seed, 0, micro.samples)).to(engine.sigmas.device),
        velocity=with_graph(velocity, run.graph),
    )


def gradient_at_latent(engine: Engine, batch: Batch, surrogate: Surrogate) -> LatentGradient:
    """Decode and reward, forward and backward, as the loop does it."""

    def score(latents: Tensor, rows: list[int]) -> dict[str, Tensor]:
        images, texts = engine.model.decode(latents), [batch.prompts[row] for row in rows]
        return {name: reward(images, texts) for name, reward in engine.rewards.items()}

    return latent_gradient(surrogate, score, engine.terms, chunk=engine.run.reward_chunk)


def facts(settings: Any) -> dict[str, Any]:
    """Command's settings, commit, machine and versions."""
    return {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "commit": _answer(["git", "describe", "--always", "--dirty"]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _answer(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronized(action: Callable[[], object]) -> Callable[[], None]:
    """The action, and then whatever it has left running on a CUDA device."""

    def run() -> None:
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run

"""The models that the build trains: two sequences, each for a process of its own."""

# diffusers and transformers annotate some constructors more narrowly than they accept
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from leapalign.studies.shapeworld_build.clip import JUDGE, REWARD, train_clip
from leapalign.studies.shapeworld_build.generator import train_generator
from leapalign.studies.shapeworld_build.harden import harden_clip
from leapalign.studies.shapeworld_build.vae import train_vae


@dataclass(frozen=True, kw_only=True)
class Build:
    """Train the embedded default of leapalign."""

    out: Path = Path("build/shapeworld")
    """Work folder: states, finished parts, measurements."""
    vae_steps: int = 2400
    generator_steps: int = 8500
    reward_steps: int = 4000
    hardening_steps: int = 2500
    """Of the reward's second training, against being gamed."""
    judge_steps: int = 3000
    seed: int = 0
    """The VAE's and the generator's; the reward has the next one, the judge the one after."""
    threads: int = 1
    """Of torch, in each of the two processes."""
    install: bool = False
    """Put the finished folders into the package."""


def workers() -> ProcessPoolExecutor:
    """Run each sequence in a process of its own."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End with the parent: a killed build must not leave a process that writes beside the next build."""
    if parent := parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_generator(build: Build, begun_at: str) -> None:
    torch.set_num_threads(build.threads)
    out = build.out
    make(out, "vae", begun_at, lambda: train_vae(out / "vae", build.vae_steps, build.seed))
    vae = AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False)
    make(out, "generator", begun_at, lambda: train_generator(out / "generator", vae, build.generator_steps, build.seed))


def make_rewards(build: Build, begun_at: str) -> None:
    torch.set_num_threads(build.threads)
    out, easy, seed = build.out, build.out / "easy-reward", build.seed + 1
    make(out, "easy-reward", begun_at, lambda: train_clip(easy, REWARD, build.reward_steps, seed))
    make(out, "reward", begun_at, lambda: harden_clip(easy, out / "reward", REWARD, build.hardening_steps, seed))
    make(out, "judge", begun_at, lambda: train_clip(out / "judge", JUDGE, build.judge_steps, build.seed + 2))


def make(out: Path, name: str, begun_at: str, train: Callable[[], Any]) -> None:
    """Run `train` unless it has been done, and record its duration and the commit at the start of the build."""
    record = out / f"{name}.json"
    if record.exists():
        return
    start = time.monotonic()
    train()
    done = {"seconds": round(time.monotonic() - start), "commit": begun_at, "machine": platform.machine()}
    record.write_text(json.dumps(done | {"threads": torch.get_num_threads(), "torch": torch.__version__}))

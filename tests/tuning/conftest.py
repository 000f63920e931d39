"""Tiny folders of every family, and a run over one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_pipelines as tiny
from leapalign.methods.leapalign import LeapAlign
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES
from tiny_clip import write_tiny_clip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """family -> a tiny pipeline folder."""
    root = tmp_path_factory.mktemp("families")
    return {name: tiny.save(family.build(), root / name) for name, family in FAMILIES.items()}


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("reward") / "clip")


@pytest.fixture
def run(folders: dict[str, str], reward_folder: Path, tmp_path: Path) -> Run:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green star\n")
    return Run(
        name="lora",
        model=SD3(path=folders["sd3"], height=16, width=24, guidance_scale=3.0, max_sequence_length=5),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=PickScore(path=str(reward_folder)), threshold=2.0),),
        prompts=PromptFile(path=str(prompts)),
        out=str(tmp_path / "run"),
        tuning=LoRA(rank=2, alpha=4.0),
        steps=2,
        batch_size=4,
        micro_batch_size=2,
        num_sampling_steps=3,
        learning_rate=1e-2,
        ema_decay=0.5,
        checkpoint_every=5,
        evaluate_every=0,
        evaluation_size=2,
        device="cpu",
    )

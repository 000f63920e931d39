"""A tiny random pipeline and reward: real classes through the whole evaluation in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_clip
import tiny_pipelines as tiny
from leapalign.models.sd3 import SD3
from leapalign.rewards.clip import PickScore


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> SD3:
    folder = tiny.save(tiny.sd3_pipeline(), tmp_path_factory.mktemp("evaluated"))
    return SD3(path=folder, height=32, width=32, guidance_scale=1.0, max_sequence_length=5, decode_chunk=0)


@pytest.fixture(scope="session")
def reward_config(tmp_path_factory: pytest.TempPathFactory) -> PickScore:
    return PickScore(path=str(tiny_clip.write_tiny_clip(Path(tmp_path_factory.mktemp("reward")))))


@pytest.fixture(scope="session")
def held_out_config(tmp_path_factory: pytest.TempPathFactory) -> PickScore:
    return PickScore(path=str(tiny_clip.write_tiny_clip(Path(tmp_path_factory.mktemp("judge")), seed=7)))

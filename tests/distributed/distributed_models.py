"""Models and rewards of distributed_cases.py: small, in float64, with all that is peculiar to the real ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import tiny_pipelines
from leapalign.distributed.world import World
from leapalign.lookup.recipes import load_file
from leapalign.models.base import Conditioning, Text
from leapalign.models.guidance import Guidance, GuidedVelocity
from leapalign.models.sd3 import SD3, predict
from leapalign.rewards.clip import PickScore
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.run import RewardTerm
from leapalign.tuning.adapter import attach
from leapalign.tuning.lora import LoRA
from leapalign.tuning.targets import find_targets
from tiny_checkpoints import write_tiny_imagereward
from tiny_qwen import write_tiny_hpsv3

Tiny = load_file(str(Path(__file__).parents[1] / "training" / "tiny_recipe.py")).Tiny


@lru_cache
def _transformer() -> Any:
    return tiny_pipelines.sd3_pipeline(with_t5=False).transformer


@dataclass(frozen=True, kw_only=True)
class GuidedSD3:
    """diffusers' SD3 transformer with two blocks, in float64, under true guidance; no VAE and no text encoders."""

    name: ClassVar[str] = "guided-sd3"
    same_forwards: ClassVar[bool] = True

    def load(self, device: str, dtype: str, tuning: Any, loading: Any = None) -> Guided:
        policy = copy.deepcopy(_transformer()).requires_grad_(True)
        if isinstance(tuning, LoRA):
            policy.requires_grad_(False)
            attach(policy, find_targets(policy, (), SD3.lora_targets), rank=tuning.rank, alpha=tuning.rank)
        return Guided(policy.double())


class Guided(Tiny):
    """Latents [4, 4, 4]; tokens and pooled features that depend on the prompt."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.dtype, self.prepared = policy, torch.float64, []

    def encode(self, prompts: Any) -> Conditioning:
        return Conditioning(Text.stack([_text(prompt) for prompt in prompts]), _text(""))

    def noise(self, generators: Any) -> torch.Tensor:
        return torch.stack([torch.randn(4, 4, 4, generator=g, dtype=torch.float64) for g in generators])

    def velocity(self, conditioning: Conditioning) -> Any:
        return GuidedVelocity(
            lambda x, t, text: predict(self.policy, x, 1000 * t, text), conditioning, Guidance(3.0, True, "")
        )


@dataclass(frozen=True, kw_only=True)
class Double:
    """A reward in float64, which a run's dtype does not offer."""

    differentiable: ClassVar[bool] = True

    reward: Any

    @property
    def name(self) -> str:
        return self.reward.name

    def load(self, device: str, dtype: str) -> Any:
        return self.reward.load(device, "float64")


def networks(folder: Path, world: World) -> tuple[RewardTerm, ...]:
    """Rewards with all that is peculiar: kept text features, cross-attention, a forward a sample of its own length."""
    if world.main:
        write_tiny_imagereward(folder / "imagereward")
        (folder / "hpsv3").mkdir()
        write_tiny_hpsv3(folder / "hpsv3")
    dist.barrier()
    large = str(folder / "hpsv3")
    rewards = (
        PickScore(path="embedded:reward"),
        ImageReward(path=str(folder / "imagereward"), processor=str(folder / "imagereward")),
        HPSv3(path=large, processor=large),
    )
    return tuple(RewardTerm(reward=Double(reward=reward), threshold=9.0, weight=9.0) for reward in rewards)


def _text(prompt: str) -> Text:
    phase = torch.arange(5 * 32 + 24, dtype=torch.float64) * (1 + len(prompt))
    return Text(phase[: 5 * 32].sin().view(1, 5, 32), phase[5 * 32 :].cos().view(1, 24))


def sd3_with_t5(folder: Path, world: World) -> SD3:
    if world.main and not (folder / "sd3-t5").exists():
        tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=True), folder / "sd3-t5")
    dist.barrier()
    return SD3(path=str(folder / "sd3-t5"), height=8, width=8, guidance_scale=3.0, max_sequence_length=12)

"""A user's own recipe file: a model and a reward of a few numbers, so that the loop itself can be tested in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from leapalign.methods.leapalign import LeapAlign
from leapalign.prompts import PromptFile
from leapalign.run import RewardTerm, Run

PROMPTS = ["red", "a green one", "blue and more", "the fourth prompt", "five"]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Latents [3, 4, 4]; the velocity is a small network of x, sigma and the prompt's length."""

    name: ClassVar[str] = "tiny"

    double: bool = False

    @property
    def same_forwards(self) -> bool:
        return True

    def load(self, device: str, dtype: str, tuning: object = None, loading: object = None) -> Tiny:
        return Tiny(self.double)


@dataclass(frozen=True, kw_only=True)
class TinyReward:
    """Bright pictures, more so for long prompts; `spoil` makes the answer NaN for the prompt of that text."""

    name: ClassVar[str] = "tiny-reward"

    spoil: str = ""
    spoil_gradient: str = ""

    def load(self, device: str, dtype: str):
        def reward(images, prompts):
            import torch

            def score(image, prompt):
                r = image.mean() * (1 + 0.01 * len(prompt))
                if prompt == self.spoil_gradient:
                    r = r + (0 * r).sqrt()  # the value stays, the gradient is NaN
                return r * torch.nan if prompt == self.spoil else r

            return torch.stack([score(image, prompt) for image, prompt in zip(images, prompts)])

        return reward


@dataclass(frozen=True, kw_only=True)
class Toward:
    """Pictures of one brightness, by default dark ones. Has no gradient, which a held-out reward does not need."""

    name: ClassVar[str] = "toward"
    differentiable: ClassVar[bool] = False

    target: float = 0.0

    def load(self, device: str, dtype: str):
        return lambda images, prompts: 1 - (images.mean((1, 2, 3)) - self.target).abs()


class Tiny:
    def __init__(self, double: bool) -> None:
        import torch
        from torch import nn

        torch.manual_seed(3)
        self.dtype = torch.float64 if double else torch.float32
        self.policy = nn.Sequential(nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 48)).to(self.dtype)
        self.prepared: list[str] = []

    def prepare(self, prompts):
        self.prepared = list(prompts)

    def encode(self, prompts):
        import torch

        assert set(prompts) <= set(self.prepared)
        return torch.tensor([[0.1 * len(prompt)] for prompt in prompts], dtype=self.dtype)

    def noise(self, generators):
        import torch

        return torch.stack([torch.randn(3, 4, 4, generator=g, dtype=torch.float32) for g in generators]).to(self.dtype)

    def sigmas(self, num_steps):
        import torch

        return torch.linspace(0, 1, num_steps + 1, dtype=self.dtype)

    def velocity(self, conditioning):
        def velocity(x, sigma):
            import torch

            times = sigma.reshape(-1, 1).expand(len(x), 1)  # one time, or one for each sample
            features = torch.cat([x.flatten(1), times, conditioning], dim=1)
            return self.policy(features).view_as(x)

        return velocity

    def decode(self, latents):
        return latents.sigmoid()

    def save(self, folder):
        from safetensors.torch import save_file

        save_file(self.policy.state_dict(), Path(folder) / "policy.safetensors")


def tiny() -> Run:
    return Run(
        name="tiny",
        model=TinyModel(),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=TinyReward(), threshold=2.0),),
        prompts=PromptFile(path="prompts.txt"),
        out="run",
        steps=4,
        batch_size=4,
        micro_batch_size=2,
        num_sampling_steps=5,
        learning_rate=1e-2,
        ema_decay=0.9,
        checkpoint_every=2,
        evaluate_every=2,
        evaluation_size=3,
        device="cpu",
    )

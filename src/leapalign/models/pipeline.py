"""A `Model` put together from a pipeline folder's parts; what differs between families comes in as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.models.base import Conditioning, Text
from leapalign.models.decode import Decoder
from leapalign.models.folder import PipelineFolder, load_part, save_with
from leapalign.models.guidance import guided, in_precision
from leapalign.models.prompt_store import PromptStore
from leapalign.models.text import Encoder, PromptCache

if TYPE_CHECKING:
    from leapalign.flow.rollout import Velocity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Guidance:
    """True classifier-free guidance; a scale of at most 1 means one branch and no negative prompt, as in diffusers."""

    scale: float
    through_both: bool
    negative_prompt: str

    @property
    def active(self) -> bool:
        return self.scale > 1


@dataclass(eq=False)
class PipelineModel:
    """Implements `leapalign.models.base.Model`."""

    policy: nn.Module
    folder: PipelineFolder  # where every part that is not trained is copied from
    prompts: PromptCache
    decoder: Decoder
    latent_shape: tuple[int, int, int]  # channels, height, width
    guidance: Guidance
    predict: Callable[[nn.Module, Tensor, Tensor, Text], Tensor]  # the family's forward: policy, x, sigma, text -> v
    grid: Callable[[int], Tensor]  # the family's scheduler: T -> sigmas [T+1], descending as diffusers has them
    device: str
    dtype: torch.dtype

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prompts.prepare([*prompts, *self._negative])

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts.fill([*prompts, *self._negative])
        return Conditioning(self.prompts(prompts), self.prompts(self._negative) if self._negative else None)

    @property
    def _negative(self) -> list[str]:
        return [self.guidance.negative_prompt] if self.guidance.active else []

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [torch.randn(self.latent_shape, generator=g, device=g.device) for g in generators]
        return torch.stack([row.to(self.device) for row in rows])  # [B, C, h, w]

    def sigmas(self, num_steps: int) -> Tensor:
        return self.grid(num_steps).flip(0).to(self.device, torch.float32)

    def velocity(self, conditioning: Conditioning) -> Velocity:
        predict = in_precision(lambda x, sigma, text: self.predict(self.policy, x, sigma, text), self.dtype)
        return guided(predict, conditioning, self.guidance.scale, through_both=self.guidance.through_both)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def save(self, folder: str | Path) -> None:
        save_with(self.folder, self.policy, folder)


def prompt_cache(
    load_encoder: Callable[[], Encoder],
    folder: PipelineFolder,
    parts: tuple[str, ...],
    device: str,
    dtype: torch.dtype,
    **settings: Any,
) -> PromptCache:
    """The cache of a family's prompts, on disk too. `parts` and `settings` are all that decides an embedding."""
    decisive = {"device": torch.device(device).type, "dtype": str(dtype).removeprefix("torch."), **settings}
    return PromptCache(load_encoder, device, PromptStore.of(folder, parts, decisive))


def load_decoder(folder: PipelineFolder, device: str, chunk: int) -> Decoder:
    vae = load_part(folder, "vae", torch.float32).to(device)
    return Decoder(vae, float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0), chunk)


def load_scheduler(folder: PipelineFolder) -> Any:
    """Only its grid is used, so a scheduler whose step is not plain Euler would be silently replaced: refused."""
    scheduler = load_part(folder, "scheduler")
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise UserError(
            f"{folder.path}: scheduler {type(scheduler).__name__}; expected FlowMatchEulerDiscreteScheduler"
        )
    for switch in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(switch):
            raise UserError(f"{folder.path}: the scheduler has {switch} on; leaps need the plain ODE, switch it off")
    return scheduler


def vae_factor(vae: Any) -> int:
    """Pixels a latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def parse_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises UserError unless both are positive multiples of VAE factor times patch."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(f"{name} {value} is not a positive multiple of {multiple} (VAE factor x patch); try {near}")

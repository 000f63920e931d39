"""What the loop asks of a model: prompts -> conditioning, noise, grid, velocity, decode (docs/models.md).

Time runs from 1 (noise) to 0 (image); pixels are float in [0, 1], [B, 3, H, W]. Every family's own conventions end
inside its adapter. Importing this file costs nothing: torch comes with `load()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from leapalign.flow.rollout import Velocity


@dataclass(frozen=True)
class Text:
    """Encoded prompts, as the transformers of diffusers take them."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]

    def to(self, device: torch.device | str) -> Text:
        return Text(self.tokens.to(device), self.pooled.to(device))

    def expand(self, rows: int) -> Text:
        """One row becomes `rows` rows (a view)."""
        return Text(self.tokens.expand(rows, -1, -1), self.pooled.expand(rows, -1))


@dataclass(frozen=True)
class Conditioning:
    """What `velocity` is bound to: B prompts, and the negative prompt where there is true guidance."""

    prompts: Text  # [B, ...]
    negative: Text | None = None  # [1, ...]


class Model(Protocol):
    """A text-to-image flow model; `policy` is trained, everything else is frozen."""

    policy: nn.Module

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode all of them (and the negative prompt) into the cache, then free the text encoders."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """From the cache; prompts that are not in it load the text encoders again, until the next `prepare`."""
        ...

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal [B, *latent], float32: row i depends on generators[i] alone."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """Ascending [T+1], indexed by steps still to go: sigmas[0] = 0 is the image."""
        ...

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """v(x, sigma) ~ dx/dsigma after guidance, float32, differentiable in x and in the policy's weights."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[N, *latent] -> images [N, 3, H, W] in [0, 1], differentiable."""
        ...

    def save(self, folder: str | Path) -> None:
        """A complete diffusers pipeline folder with the policy's present weights."""
        ...

"""Decode latents to pixels under gradient, a few images at a time: only one chunk's graph exists at any moment.

Of several chunks each is one `torch.utils.checkpoint` segment: the forward keeps the latents alone, the backward
rebuilds one chunk's graph, uses it and frees it. A batch that is one chunk is decoded once and keeps its graph; chunks
of one image are rebuilt in any case, because a large model's decoder then never lies in memory beside the reward's
graph. The gradient does not depend on the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.errors import UserError


def straight_through_clamp(x: Tensor) -> Tensor:
    """Value: x clamped to [0, 1]. Gradient: of x, also outside, where a clamp would return zero and stay stuck."""
    # the detached part is the value, the bracket is zero and carries the graph
    return x.clamp(0, 1).detach() + (x - x.detach())


def with_pixel_gradient(images: Tensor, how: Literal["straight-through", "clamp"]) -> Tensor:
    """The same images [N, 3, H, W], with the gradient that a run wants for pixels outside [0, 1] before their clamp.

    "straight-through": as if they were not clamped. "clamp": none; these are the pixels whose value is now 0 or 1.
    """
    if how == "straight-through":
        return images
    return torch.where((images > 0) & (images < 1), images, images.detach())  # the detached part has no gradient


def plain_decode(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


@dataclass(frozen=True)
class Decoder:
    """A VAE and its latents' normalisation; weights frozen, arithmetic in float32."""

    vae: Any
    scale: float | Tensor  # latents = (encoded - shift) * scale; numbers, or a number a channel [C, 1, 1]
    shift: float | Tensor
    chunk: int  # images at a time; 0 = all
    call: Callable[[Any, Tensor], Tensor] = plain_decode  # vae, encoded [n, C, h, w] -> [n, 3, H, W], black -1, white 1

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise UserError(
                f"decode_chunk {self.chunk}: expected the pictures to decode at a time, or 0 for all of them"
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [N, ...] -> pixels [N, 3, H, W] in [0, 1], float32."""
        if self.chunk != 1 and (self.chunk == 0 or self.chunk >= len(latents)):
            return self._pixels(latents)
        return torch.cat([self._checkpointed(z) for z in latents.split(self.chunk)])

    def encoded(self, latents: Tensor) -> Tensor:
        """Latents as the VAE has them, [n, C, h, w] float32."""
        return latents.float() / self.scale + self.shift

    def _checkpointed(self, z: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and z.requires_grad):
            return self._pixels(z)
        # the decoder draws nothing, so there is no random state to keep
        return checkpoint(self._pixels, z, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def _pixels(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # half precision shows as blocks and bands in pixels
            decoded = self.call(self.vae, self.encoded(z))
        return straight_through_clamp(decoded * 0.5 + 0.5)

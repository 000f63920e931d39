"""Decode latents to pixels with gradient, a few images at a time: only one chunk's graph exists at any moment.

Each of several chunks is one `torch.utils.checkpoint` segment: the forward keeps only latents; the backward rebuilds,
uses and frees one chunk's graph at a time. A batch of one chunk is decoded once and keeps its graph, except chunks of
one image, which are always rebuilt so that a large decoder's graph is never in memory beside the reward's. Gradients
do not depend on the chunk size.
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
    """Clamp x to [0, 1] with the gradient of x everywhere; a plain clamp has zero gradient outside and gets stuck."""
    # the detached term is the value; the bracket is zero and carries the graph
    return x.clamp(0, 1).detach() + (x - x.detach())


def with_pixel_gradient(images: Tensor, how: Literal["straight-through", "clamp"]) -> Tensor:
    """Return images [N, 3, H, W] with the gradient of choice for pixels that were outside [0, 1] before the clamp.

    "straight-through": as if unclamped. "clamp": zero; these are the pixels whose value is now 0 or 1.
    """
    if how == "straight-through":
        return images
    return torch.where((images > 0) & (images < 1), images, images.detach())  # the detached part has no gradient


def plain_decode(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


@dataclass(frozen=True)
class Decoder:
    """A frozen VAE and the normalisation of its latents; computes in float32."""

    vae: Any
    scale: float | Tensor  # latents = (encoded - shift) * scale; scalars, or per channel [C, 1, 1]
    shift: float | Tensor
    chunk: int  # images decoded at a time; 0 = all
    call: Callable[[Any, Tensor], Tensor] = plain_decode  # vae, encoded [n, C, h, w] -> [n, 3, H, W], black -1, white 1

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise UserError(f"decode_chunk {self.chunk}: expected the images to decode at a time, or 0 for all of them")

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents [N, ...] to pixels [N, 3, H, W] in [0, 1], float32."""
        if self.chunk != 1 and (self.chunk == 0 or self.chunk >= len(latents)):
            return self._pixels(latents)
        return torch.cat([self._checkpointed(z) for z in latents.split(self.chunk)])

    def encoded(self, latents: Tensor) -> Tensor:
        """Undo the normalisation: latents as the VAE encodes them, [n, C, h, w], float32."""
        return latents.float() / self.scale + self.shift

    def _checkpointed(self, z: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and z.requires_grad):
            return self._pixels(z)
        # the decoder draws no random numbers, so no RNG state is kept
        return checkpoint(self._pixels, z, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def _pixels(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # half precision causes visible blocks and bands
            decoded = self.call(self.vae, self.encoded(z))
        return straight_through_clamp(decoded * 0.5 + 0.5)

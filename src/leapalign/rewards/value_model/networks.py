"""What a value model reads of an image and a prompt, and the networks on top.

`PixelInputs` and `ConvNet` need no other model: a small convolutional network with the pixels' coordinates, whose
channels are scaled and shifted by the prompt (FiLM, arXiv 1709.07871); words are hashed and read by a GRU.
`ClipInputs` and `FeatureNet` put three layers on the image and text features of a frozen CLIP.

No layer mixes samples, so that a score depends on its own image and prompt alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from leapalign.rewards.clip.model import ClipReward

WORDS, BUCKETS = 48, 1024  # words read of a prompt; ids of words, of which 0 means none


class Inputs(Protocol):
    """What a network reads. Packed values are what the buffer keeps, on the CPU."""

    def image(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1], differentiably: [B, ...]."""
        ...

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts: [B, ...], on the CPU."""
        ...

    def pack(self, encoded: Tensor) -> Tensor:
        """Shorten encoded images for the buffer."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """Return encoded images from packed ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelInputs:
    """Pixels of a square image, and hashed words."""

    size: int

    def image(self, images: Tensor) -> Tensor:
        """Resize to [B, 3, size, size]."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        return functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Hash words: int64 [B, WORDS], 0 after the last one."""
        ids = torch.zeros(len(prompts), WORDS, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(prompt.lower().split()[:WORDS]):
                ids[row, place] = 1 + zlib.crc32(word.encode()) % (BUCKETS - 1)
        return ids

    def pack(self, encoded: Tensor) -> Tensor:
        return (encoded.clamp(0, 1) * 255).round().to(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.float() / 255


@dataclass(frozen=True, kw_only=True)
class ClipInputs:
    """Unit image and text features [B, D] of a frozen CLIP."""

    clip: ClipReward

    def image(self, images: Tensor) -> Tensor:
        return self.clip.image_features(self.clip.preprocess(images))

    def text(self, prompts: Sequence[str]) -> Tensor:
        return self.clip.text_features(prompts).cpu()

    def pack(self, encoded: Tensor) -> Tensor:
        return encoded

    def unpack(self, packed: Tensor) -> Tensor:
        return packed


class FeatureNet(nn.Module):
    """Three layers on image features, text features and their product, [B, D] each: [B]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        layers = (nn.Linear(3 * features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 1))
        self.scale = features**0.5  # features of length 1 have entries of 1 / sqrt(D)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.scale * image, self.scale * text
        return self.layers(torch.cat((image, text, image * text), dim=1))[:, 0]


class ConvNet(nn.Module):
    """Convolutions on pixels [B, 3, S, S], conditioned on words [B, WORDS]: [B]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, width, padding_idx=0)
        self.reader = nn.GRU(width, 2 * width, batch_first=True)
        self.stem = nn.Sequential(
            *(nn.Conv2d(5, width // 2 or 1, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width // 2 or 1, width, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.SiLU()),
        )
        self.blocks = nn.ModuleList(Modulated(width, 2 * width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        words = self.read(text)
        x = self.stem(torch.cat((2 * image - 1, coordinates(image)), dim=1))
        for block in self.blocks:
            x = block(x, words)
        pooled = torch.cat((x.mean((2, 3)), x.amax((2, 3)), words), dim=1)
        return self.head(pooled)[:, 0]

    def read(self, text: Tensor) -> Tensor:
        """Return the reader's state after the last word: [B, 2 width]."""
        states, _ = self.reader(self.embedding(text))
        last = (text > 0).sum(1).clamp(min=1) - 1
        return states[torch.arange(len(text)), last]


class Modulated(nn.Module):
    """A residual block whose normalised channels the words scale and shift."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.film = nn.Linear(words, 2 * width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        scale, shift = self.film(words)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.first(self.norm(x)) * (1 + scale) + shift)
        return x + functional.silu(self.second(h))


def coordinates(image: Tensor) -> Tensor:
    """Return each pixel's place, in [-1, 1]: [B, 2, S, S]."""
    line = torch.linspace(-1, 1, image.shape[-1], dtype=image.dtype, device=image.device)
    return torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(image), 2, -1, -1)

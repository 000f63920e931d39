"""Statistics of images that need no reward: a reward-trained model that loses backgrounds or turns dark shows in them.

Each is computed per image, on pixel values as they are stored (not linearised). `DEFINITIONS` states them in words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601, as Pillow's mode L)
EDGE = 0.1  # smallest difference of luma between neighbours that counts as an edge
DARK = 0.2  # luma below which a pixel is dark
LEVELS = 8  # a channel, of the histogram of colours

DEFINITIONS = {
    "edge_density": f"share of pixels whose luma differs by more than {EDGE} from the right or lower neighbour, [0, 1]",
    "color_entropy": f"entropy in bits of the image's colours, in {LEVELS} levels a channel, [0, 9]",
    "saturation": "mean of (max - min) / max over red, green, blue of each pixel (0 for black), [0, 1]",
    "brightness": "mean luma, 0.299 R + 0.587 G + 0.114 B, [0, 1]",
    "dark_share": f"share of pixels with a luma below {DARK}, [0, 1]",
}


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Return name -> values [N] float32 for images [N, 3, H, W] in [0, 1]; names as in `DEFINITIONS`.

    H and W are at least 2. NaN and infinity must not occur.
    """
    images = images.float().clamp(0, 1)
    return {name: measure(images) for name, measure in _MEASURES.items()}


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> luma [N, H, W]."""
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1)


def edge_density(images: Tensor) -> Tensor:
    """Share of the pixels with a right and a lower neighbour that differ from one of these: [N]."""
    grey = luma(images)
    here = grey[:, :-1, :-1]
    right, below = (grey[:, :-1, 1:] - here).abs(), (grey[:, 1:, :-1] - here).abs()
    return (torch.maximum(right, below) > EDGE).float().mean((1, 2))


def color_entropy(images: Tensor) -> Tensor:
    """Shannon entropy in bits of each image's histogram of LEVELS³ colours: [N]."""
    bins = (images * LEVELS).long().clamp(max=LEVELS - 1)  # [N, 3, H, W]
    colors = ((bins[:, 0] * LEVELS + bins[:, 1]) * LEVELS + bins[:, 2]).flatten(1)  # [N, H * W]
    counts = torch.zeros(len(images), LEVELS**3, device=images.device)
    counts.scatter_add_(1, colors, torch.ones_like(colors, dtype=counts.dtype))
    shares = counts / colors.shape[1]
    return torch.special.entr(shares).sum(1) / torch.tensor(2.0).log().item()


def saturation(images: Tensor) -> Tensor:
    """Mean saturation as in HSV: [N]."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


def brightness(images: Tensor) -> Tensor:
    """Mean luma: [N]."""
    return luma(images).mean((1, 2))


def dark_share(images: Tensor) -> Tensor:
    """Share of dark pixels: [N]."""
    return (luma(images) < DARK).float().mean((1, 2))


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "edge_density": edge_density,
    "color_entropy": color_entropy,
    "saturation": saturation,
    "brightness": brightness,
    "dark_share": dark_share,
}

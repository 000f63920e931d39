"""Image files and tensors: the one place where a file becomes pixels, and pixels become a file's levels.

Tensors are float32 [3, H, W] in [0, 1]; PIL images are RGB with 8 bits a channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leapalign.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


def read_image(path: Path) -> Image:
    """Open an image file as RGB; transparency is dropped, as the published packages do. Raises UserError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); give PNG, JPEG or WebP") from None


def to_tensor(image: Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def to_levels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3], rounded to the nearest level; values outside are clamped."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def to_pil(image: Tensor) -> Image:
    """[3, H, W] in [0, 1] as an RGB image."""
    from PIL import Image

    return Image.fromarray(to_levels(image))

"""Image files and tensors: the one place where a file becomes pixels, and pixels become a file's levels.

Tensors are float32 [3, H, W] in [0, 1]; PIL images are RGB with 8 bits a channel.

Departures from `Image.open(file).convert("RGB")`, with which published scores were made; it clips 16-bit grey to white,
takes float images in [0, 1] for black, and leaves a photo lying on its side:
- 16-bit grey is scaled to 8 bits, and so are float images in [0, 1];
- the orientation in EXIF is applied: the image is what every viewer shows;
- animations and values beyond these ranges are refused.
As there, transparency is dropped and colour profiles are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leapalign.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second


def read_image(path: Path) -> Image:
    """Read an image file as upright RGB. Raises UserError, which names the file, if its pixels are not understood."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            _check(image, path)
            return ImageOps.exif_transpose(_rgb(image, path))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); give PNG, JPEG or WebP") from None


def check_image(path: Path) -> None:
    """Raise UserError unless the file's header is that of an image that `read_image` accepts; decodes no pixels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            _check(image, path)
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
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


def _check(image: Image, path: Path) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with a preview behind it
        raise UserError(f"{path}: has {frames} images (an animation or a document); save one of them as a file")


def _rgb(image: Image, path: Path) -> Image:
    """The image in 8 bits, with its EXIF data."""
    if image.mode.startswith("I"):
        return _scaled(image, _top(image, path), path)
    if image.mode == "F":
        return _scaled(image, 1.0, path)
    return image.convert("RGB")


def _top(image: Image, path: Path) -> float:
    """The value that is white in an image of integers beyond 8 bits."""
    from PIL.TiffImagePlugin import TiffImageFile

    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if (image.mode == "I" and image.format not in ("PNG", "PPM")) or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise UserError(f"{path}: {image.format} with 32-bit or inverted grey values; save it with 8 or 16 bits")
    return 2.0 ** tags.get(_BITS, (16,))[0] - 1


def _scaled(image: Image, top: float, path: Path) -> Image:
    """Grey values in [0, top] as RGB."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # NaN fails too
        raise UserError(f"{path}: grey values in [{low:g}, {high:g}]; expected [0, {top:g}]: rescale it or save 8 bits")
    scaled = Image.fromarray(np.rint(values / top * 255).astype(np.uint8)).convert("RGB")
    scaled.info["exif"] = image.getexif().tobytes()
    return scaled

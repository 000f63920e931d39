"""Model families, one file each with all facts of the family. Imports no torch."""

from leapalign.models.flux import Flux
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.qwen_image import QwenImage
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage

FAMILIES = (Flux, Flux2Klein, QwenImage, SD3, ZImage)

__all__ = ["FAMILIES", "SD3", "Flux", "Flux2Klein", "QwenImage", "ZImage"]

"""Rewards: images [B, 3, H, W] in [0, 1] and prompts -> one score per image [B], differentiable in the images.

Each published reward has its own folder. Importing this package imports no torch.
"""

from leapalign.rewards.aesthetic import Aesthetic
from leapalign.rewards.base import DescribedReward
from leapalign.rewards.clip import CLIPScore, PickScore
from leapalign.rewards.custom import Custom
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.rewards.imagereward import ImageReward
from leapalign.rewards.jpeg import JPEGSize
from leapalign.rewards.ocr import OCR
from leapalign.rewards.unified import UnifiedReward
from leapalign.rewards.value_model import ValueModel

BUILT_IN: tuple[type[DescribedReward], ...] = (
    PickScore,
    CLIPScore,
    HPSv2,
    HPSv3,
    ImageReward,
    Aesthetic,
    OCR,
    JPEGSize,
    UnifiedReward,
    ValueModel,
    Custom,
)

__all__ = [
    "BUILT_IN",
    "OCR",
    "Aesthetic",
    "CLIPScore",
    "Custom",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "JPEGSize",
    "PickScore",
    "UnifiedReward",
    "ValueModel",
]

"""The aesthetic score on a transformers `CLIPModel`'s vision tower; the text tower is dropped after loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.base import Reward, check_images, check_inputs, check_prompts, tried
from leapalign.rewards.checkpoint import read_checkpoint
from leapalign.rewards.clip.model import project, unit_length
from leapalign.rewards.linear_head import LinearHead, head_dtype, head_widths
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.pretrained import load_model, load_preprocess, torch_dtype
from leapalign.storage.embedded import resolve

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPModel


class AestheticScorer(nn.Module):
    """Vision tower and head of the aesthetic score."""

    def __init__(self, clip: CLIPModel, head: LinearHead) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.head = head


@dataclass(frozen=True, kw_only=True)
class AestheticReward(Reward):
    """The aesthetic score; see `leapalign.rewards.base.Reward`. Prompts have no influence."""

    name: str
    model: AestheticScorer
    preprocess: Preprocess

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        check_inputs(self.name, images, prompts)
        return self.score_images(images)

    def score_images(self, images: Tensor) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] without prompts: [B], differentiable."""
        check_images(self.name, images)
        return self.scores(self.preprocess(images))

    @torch.no_grad()  # the Pillow path only evaluates files
    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through the reference preprocessing: [B]."""
        check_prompts(self.name, images, prompts)
        return self.scores(self.preprocess.from_pil(images))

    def scores(self, pixel_values: Tensor) -> Tensor:
        """Score normalised pixels [B, 3, size, size]: [B], on their device."""
        return self.score(self.image_features(pixel_values)).to(pixel_values.device)

    def network(self) -> nn.Module:
        return self.model

    def image_embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the map from images [B, 3, H, W] in [0, 1] to CLIP's normalised image features [B, D]."""
        return lambda images: unit_length(self.image_features(self.preprocess(images)))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Project normalised pixels [B, 3, size, size] to features [B, D], not normalised, on the model's device."""
        return project(self.model.vision_model, self.model.visual_projection, pixel_values)

    def score(self, features: Tensor) -> Tensor:
        """Score features [B, D] of any norm: [B], at least float32."""
        return self.model.head(unit_length(features))


def load_aesthetic(
    name: str, path: str, head: str, files: Sequence[str], processor: str, device: str, dtype: str
) -> AestheticReward:
    """Load CLIP and head. Raises UserError if one is missing, if they do not fit, or for another CLIP activation."""
    target, folder = torch_dtype(name, dtype), resolve(path)
    checkpoint = read_checkpoint(name, head, files)
    widths = head_widths(checkpoint)
    linear = checkpoint.fill(lambda: LinearHead(widths), checkpoint.weights)
    linear.to(device, head_dtype(target))
    clip, _ = load_model(name, folder, device, dtype)
    vision: Any = clip.config.vision_config  # transformers types it as dict or None
    if vision.hidden_act != "quick_gelu":
        raise UserError(
            f"{name}: {folder} says hidden_act {vision.hidden_act!r} for its vision tower; the head was trained on "
            "OpenAI's ViT-L/14, which needs 'quick_gelu' (a published image scored 4.44 without it instead of 5.05). "
            "Use openai/clip-vit-large-patch14, or correct vision_config.hidden_act if these are its weights"
        )
    if widths[0] != clip.config.projection_dim:
        raise UserError(
            f"{name}: the head in {checkpoint.file} reads {widths[0]} numbers, but the CLIP at {folder} gives "
            f"{clip.config.projection_dim}; the published head (768) belongs to OpenAI's ViT-L/14"
        )
    reward = AestheticReward(
        name=name,
        model=AestheticScorer(clip, linear).eval(),
        preprocess=load_preprocess(name, resolve(processor) or folder, vision.image_size, "half-even"),
    )
    return tried(name, folder, reward)

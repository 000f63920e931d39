"""A transformers `CLIPModel` as a reward: frozen weights, cached text, gradient at the image.

Image and text features are L2-normalised as in CLIP (arXiv 2103.00020, Fig. 3); the score is their cosine, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.base import Reward, check_ids, check_inputs, check_prompts, tried
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.pretrained import load_model, load_preprocess, load_tokenizer
from leapalign.storage.embedded import resolve
from leapalign.storage.token_limits import TooLong, count_longer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPModel


@dataclass(frozen=True, kw_only=True)
class Head:
    """Conversion of the cosine to a published number."""

    scale: float = 1.0
    logit_scale: bool = False  # multiply by the model's exp(logit_scale)
    clamp: bool = False  # max(., 0): NaN stays NaN
    prefix: str = ""  # put before every caption
    rounding: Literal["floor", "half-even"] = "floor"  # rounding of the centre crop's offset


@dataclass(frozen=True, kw_only=True)
class ClipReward(Reward):
    """The cosine of image and text; see `leapalign.rewards.base.Reward`.

    Text features are computed once per prompt, without graph, and cached (4 KB each for ViT-H). Prompts are encoded one
    at a time, so features are bit-identical in any batch and a resumed run repeats exactly.
    """

    name: str
    model: CLIPModel
    preprocess: Preprocess
    head: Head
    logit_scale: float  # exp of the model's parameter, before rounding to half precision
    tokenizer: Any  # transformers has no common public type; None: ids only
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        check_inputs(self.name, images, prompts)
        return self.score(self.image_features(self.preprocess(images)), self.text_features(prompts))

    def score_ids(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score captions given as token ids [B, L], prefix included: [B], differentiable."""
        check_ids(self.name, images, input_ids)
        text = self.text_features_of_ids(input_ids, attention_mask)
        return self.score(self.image_features(self.preprocess(images)), text)

    @torch.no_grad()  # the Pillow path only evaluates files
    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through the reference preprocessing: [B]."""
        check_prompts(self.name, images, prompts)
        return self.score(self.image_features(self.preprocess.from_pil(images)), self.text_features(prompts))

    def network(self) -> nn.Module:
        return self.model

    def image_embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the map from images [B, 3, H, W] in [0, 1] to CLIP's normalised image features [B, D]."""
        return lambda images: self.image_features(self.preprocess(images))

    def score(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Score normalised features [..., D], which may broadcast: [...]."""
        cosine = (image_features * text_features.to(image_features)).sum(-1)
        scaled = cosine * (self.logit_scale if self.head.logit_scale else self.head.scale)
        return scaled.clamp(min=0) if self.head.clamp else scaled

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels [B, 3, size, size] to unit vectors [B, D], on the pixels' device."""
        features = project(self.model.vision_model, self.model.visual_projection, pixel_values)
        return unit_length(features).to(pixel_values.device)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Compute and cache the text features of new prompts."""
        for prompt in prompts:
            if prompt not in self.cache:
                self.cache[prompt] = self.text_features_of_ids(*self.tokenize(prompt))[0]

    def longer(self, prompts: Sequence[str]) -> TooLong:
        return count_longer(self.tokenizer, [self.head.prefix + prompt for prompt in prompts], self.text_length)

    @property
    def text_length(self) -> int:
        """Token limit of the model, start and end tokens included."""
        config: Any = self.model.config.text_config
        return config.max_position_embeddings

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to unit vectors [B, D], on the model's device."""
        self.prepare(prompts)
        return torch.stack([self.cache[prompt] for prompt in prompts])

    @torch.no_grad()  # the text has no trained inputs
    def text_features_of_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode token ids [B, L] to unit vectors [B, D]. Tokens after the end token have no influence."""
        mask = None if attention_mask is None else attention_mask.to(self.model.device)
        pooled = self.model.text_model(input_ids=input_ids.to(self.model.device), attention_mask=mask).pooler_output
        return unit_length(self.model.text_projection(pooled))

    def tokenize(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return ids and mask [1, L], L = the token limit; longer prompts are cut and keep their end token."""
        if self.tokenizer is None:
            raise UserError(f"{self.name}: loaded with prompts=False; only score_ids works. Load with prompts=True")
        tokens = self.tokenizer(
            [self.head.prefix + prompt],
            padding="max_length",
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]


def project(vision: nn.Module, projection: nn.Linear, pixel_values: Tensor) -> Tensor:
    """Project normalised pixels [B, 3, size, size] to features [B, D], not normalised, on the weights' device."""
    # `to(weight)` sets both device and dtype
    return projection(vision(pixel_values=pixel_values.to(projection.weight)).pooler_output)


def unit_length(features: Tensor) -> Tensor:
    """L2-normalise in at least float32, because a half-precision cosine has two digits."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / features.norm(dim=-1, keepdim=True)


def torchmetrics_mean(scores: Tensor) -> Tensor:
    """Return torchmetrics' batch value, which averages 100 cos first and clamps the mean, not the pairs."""
    return scores.mean().clamp(min=0)


def load_clip_reward(
    name: str, path: str, processor: str, head: Head, device: str, dtype: str, *, prompts: bool
) -> ClipReward:
    """Load weights, preprocessing and (for `prompts`) tokenizer of a folder or hub id. Raises UserError."""
    folder = resolve(path)
    processor_folder = resolve(processor) if processor else folder
    model, logit_scale = load_model(name, folder, device, dtype)
    vision: Any = model.config.vision_config  # transformers types them as dict or None
    text: Any = model.config.text_config
    reward = ClipReward(
        name=name,
        model=model,
        preprocess=load_preprocess(name, processor_folder, vision.image_size, head.rounding),
        head=head,
        logit_scale=logit_scale,
        tokenizer=load_tokenizer(name, processor_folder, text.vocab_size) if prompts else None,
    )
    return tried(name, folder, reward) if prompts else reward

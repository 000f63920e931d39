"""ImageReward on transformers' BLIP classes: key map from the original names, one forward per pair.

All sizes except the number of heads follow from the weights' shapes. The heads of the published widths are known;
for another size, a config.json beside the checkpoint states `vision.num_heads` and `text.num_attention_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.base import Reward, check_ids, check_inputs, check_prompts, tried
from leapalign.rewards.checkpoint import Checkpoint, read_checkpoint, rename, whole_numbers
from leapalign.rewards.linear_head import LinearHead, head_dtype, head_widths
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.pretrained import load_tokenizer, read_json, torch_dtype
from leapalign.rewards.sources import BERT_TOKENIZER, folder_of
from leapalign.storage.embedded import resolve
from leapalign.storage.token_limits import TooLong, count_longer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BlipTextConfig, BlipVisionConfig

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # statistics of the head's output on the training set
TEXT_LENGTH = 35  # tokens, [CLS] and [SEP] included
HEADS = {(1024, 768): (16, 12)}  # (vision width, text width) -> heads: ViT-L/16 and BERT-base

RULES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^blip\.text_encoder\.", "text."),
)
# BLIP's contrastive projections, and position ids, which transformers creates itself
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class BlipScorer(nn.Module):
    """Vision tower, text tower and head of ImageReward."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, widths: tuple[int, ...]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = LinearHead(widths)


@dataclass(frozen=True, kw_only=True)
class BlipReward(Reward):
    """ImageReward; see `leapalign.rewards.base.Reward`.

    The text tower attends to the image in each layer, so no prompt features can be computed in advance.
    """

    name: str
    model: BlipScorer
    preprocess: Preprocess
    tokenizer: Any  # transformers has no common public type; None: ids only

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        check_inputs(self.name, images, prompts)
        return self.scores(self.preprocess(images), *self.tokenize(prompts))

    def network(self) -> nn.Module:
        return self.model

    def score_ids(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score prompts given as token ids [B, L] that begin with [CLS]: [B], differentiable."""
        check_ids(self.name, images, input_ids)
        return self.scores(self.preprocess(images), input_ids, attention_mask)

    @torch.no_grad()  # the Pillow path only evaluates files
    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through the reference preprocessing: [B]."""
        check_prompts(self.name, images, prompts)
        return self.scores(self.preprocess.from_pil(images), *self.tokenize(prompts))

    def scores(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Score normalised pixels [B, 3, size, size] and ids [B, L]: [B], on the device of the pixels."""
        hidden = self.hidden(self.image_features(pixel_values), input_ids, attention_mask)
        return self.score(hidden).to(pixel_values.device)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels [B, 3, size, size] to patches [B, 1 + N, D], on the model's device."""
        # `to(weight)` sets both device and dtype
        pixels = pixel_values.to(self.model.vision.embeddings.patch_embedding.weight)
        return self.model.vision(pixel_values=pixels).last_hidden_state

    def hidden(self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden state at [CLS], [B, E], from patches [B, 1 + N, D] and ids [B, L]."""
        device = image_features.device
        mask = None if attention_mask is None else attention_mask.to(device)
        states = self.model.text(
            input_ids=input_ids.to(device), attention_mask=mask, encoder_hidden_states=image_features
        ).last_hidden_state
        return states[:, 0]

    def score(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, E] to standardised scores [B], at least float32."""
        return (self.model.mlp(hidden) - MEAN) / STD

    def longer(self, prompts: Sequence[str]) -> TooLong:
        return count_longer(self.tokenizer, prompts, TEXT_LENGTH)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, 35]; longer prompts are cut and keep their [SEP]."""
        if self.tokenizer is None:
            raise UserError(f"{self.name}: loaded with prompts=False; only score_ids works. Load with prompts=True")
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]


def load_imagereward(
    name: str, path: str, files: Sequence[str], processor: str, device: str, dtype: str, *, prompts: bool
) -> BlipReward:
    """Load the published checkpoint. Raises UserError for missing, unknown or misshapen weights."""
    target, folder = torch_dtype(name, dtype), folder_of(path)
    checkpoint = read_checkpoint(name, path, files)
    vision, text = blip_configs(checkpoint, read_json(folder, "config.json"))
    widths = head_widths(checkpoint, "mlp.")
    model = checkpoint.fill(lambda: BlipScorer(vision, text, widths), from_original(checkpoint.weights))
    model.to(device, target).mlp.to(head_dtype(target))
    reward = BlipReward(
        name=name,
        model=model,
        preprocess=imagereward_preprocess(vision),
        tokenizer=load_tokenizer(name, resolve(processor), text.vocab_size, BERT_TOKENIZER) if prompts else None,
    )
    return tried(name, path, reward) if prompts else reward


def imagereward_preprocess(vision: BlipVisionConfig) -> Preprocess:
    """Return the preprocessing: resize the shortest edge, then torchvision's centre crop."""
    size: Any = vision.image_size  # typed as number or pair; here a number
    return Preprocess(size=size, rounding="half-even")


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to `BlipScorer`'s names, without those that the score does not use."""
    return rename({key: weight for key, weight in weights.items() if not key.startswith(UNUSED)}, RULES)


def blip_configs(checkpoint: Checkpoint, told: Mapping[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Derive sizes from the shapes, heads from `told` if given. Dropout stays at transformers' 0."""
    from transformers import BlipTextConfig, BlipVisionConfig

    image, words = "blip.visual_encoder.", "blip.text_encoder."
    width, _, patch, _ = checkpoint.shape(f"{image}patch_embed.proj.weight", 4)
    vocabulary, text_width = checkpoint.shape(f"{words}embeddings.word_embeddings.weight", 2)
    heads, text_heads = _heads(checkpoint, told, width, text_width)
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=checkpoint.shape(f"{image}blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=checkpoint.count(f"{image}blocks."),
        num_attention_heads=heads,
        patch_size=patch,
        image_size=checkpoint.side(checkpoint.shape(f"{image}pos_embed", 3)[1], patch),
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's; transformers' own 1e-5 is off by 3e-3 in the score
    )
    text = BlipTextConfig(
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=checkpoint.shape(f"{words}encoder.layer.0.intermediate.dense.weight", 2)[0],
        num_hidden_layers=checkpoint.count(f"{words}encoder.layer."),
        num_attention_heads=text_heads,
        vocab_size=vocabulary,
        max_position_embeddings=checkpoint.shape(f"{words}embeddings.position_embeddings.weight", 2)[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives the layers their cross-attention; forward's own default keeps the mask bidirectional
    )
    return vision, text


def _heads(checkpoint: Checkpoint, told: Mapping[str, Any], width: int, text_width: int) -> tuple[int, int]:
    """Return the number of heads of vision and text. Raises UserError if unknown."""
    name, vision, text = checkpoint.name, told.get("vision"), told.get("text")
    if isinstance(vision, dict) and isinstance(text, dict):
        (heads,) = whole_numbers(name, "config.json, vision,", vision, "num_heads")
        (text_heads,) = whole_numbers(name, "config.json, text,", text, "num_attention_heads")
        if width % heads or text_width % text_heads:
            raise UserError(
                f"{name}: config.json says {heads} heads and {text_heads} text heads, which do not divide the widths "
                f"{width} and {text_width} of {checkpoint.file}; use the model's own"
            )
        return heads, text_heads
    if (width, text_width) not in HEADS:
        raise UserError(
            f"{name}: {checkpoint.file} is {width} wide (text {text_width}), not the published ViT-L/16 and BERT-base, "
            "and its shapes do not tell the heads; put config.json beside it with vision.num_heads and "
            "text.num_attention_heads"
        )
    return HEADS[width, text_width]

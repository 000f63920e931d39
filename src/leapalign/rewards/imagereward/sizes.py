"""ImageReward on the meta device, with its published sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.rewards.base import Weightless
from leapalign.rewards.imagereward.model import TEXT_LENGTH, BlipReward, BlipScorer, imagereward_preprocess
from leapalign.rewards.linear_head import WIDTHS

VOCABULARY = 30_522  # BERT's, without the two tokens that BLIP adds


def imagereward() -> Weightless:
    """Return BLIP's ViT-L/16 and BERT-base with ImageReward's head."""

    def make() -> BlipReward:
        from transformers import BlipTextConfig, BlipVisionConfig

        vision = BlipVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
        )
        text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)  # defaults are BERT-base's
        return BlipReward(
            name="imagereward",
            model=BlipScorer(vision, text, (768, *WIDTHS)),
            preprocess=imagereward_preprocess(vision),
            tokenizer=None,
        )

    def score(reward: BlipReward, images: Tensor) -> Tensor:
        ids = torch.randint(VOCABULARY, (len(images), TEXT_LENGTH))
        return reward.scores(reward.preprocess(images), ids, None)

    return Weightless(make=make, score=score, heads=("mlp",))

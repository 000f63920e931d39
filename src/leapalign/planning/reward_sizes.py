"""The published rewards at their full size, without weights: parameters, bytes, and the graph of a score.

The numbers are those of the published configurations, as in the shapes of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leapalign.rewards.aesthetic.model import AestheticReward, AestheticScorer
from leapalign.rewards.clip.model import ClipReward, Head
from leapalign.rewards.hpsv3.model import PIXELS, HPSv3Model, HPSv3Reward
from leapalign.rewards.imagereward.model import BlipReward, BlipScorer, imagereward_preprocess
from leapalign.rewards.linear_head import WIDTHS, LinearHead
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.qwen_vl import QwenPreprocess

CLIP_TOKENS, BERT_TOKENS, INSTRUCTION_TOKENS = 77, 35, 500  # about 500: HPSv3's instruction and a prompt
HPSV3_VOCABULARY = 151_658  # <|Reward|> comes last
IMAGE_TOKEN = 151_655


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A loaded reward of the published sizes, whatever its weights hold, and its scores without a tokenizer.

    `score` reads no value of the images, so that it also works on tensors that have none.
    """

    make: Callable[[], Any]  # has `model`, an nn.Module; called where weights have no memory
    score: Callable[[Any, Tensor], Tensor]  # the reward and images [B, 3, H, W] -> [B]


def random_ids(vocabulary: int, rows: int, length: int) -> Tensor:
    """[rows, length], the highest of them last, as the end token of CLIP is."""
    ids = torch.randint(vocabulary - 1, (rows, length))
    ids[:, -1] = vocabulary - 1
    return ids


def vit_h() -> Any:
    """CLIP ViT-H/14: HPSv2 and PickScore."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 2},
        projection_dim=1024,
    )


def vit_l() -> Any:
    """OpenAI's CLIP ViT-L/14: CLIPScore and the aesthetic score."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224},
        text_config={**text, "eos_token_id": 2},
        projection_dim=768,
    )


def clip(name: str, config: Callable[[], Any], *, pad: bool = False) -> Architecture:
    """A cosine of image and text."""
    from transformers import CLIPModel

    def make() -> ClipReward:
        model: Any = CLIPModel(config())
        preprocess = Preprocess(size=model.config.vision_config.image_size, fit="pad" if pad else "crop")
        return ClipReward(name=name, model=model, preprocess=preprocess, head=Head(), logit_scale=100.0, tokenizer=None)

    def score(reward: ClipReward, images: Tensor) -> Tensor:
        text: Any = reward.model.config.text_config
        ids = random_ids(text.vocab_size, len(images), text.max_position_embeddings)
        features = reward.image_features(reward.preprocess(images))
        return reward.score(features, reward.text_features_of_ids(ids))

    return Architecture(make=make, score=score)


def aesthetic() -> Architecture:
    """LAION's head on OpenAI's ViT-L/14."""

    def make() -> AestheticReward:
        from transformers import CLIPModel

        model = AestheticScorer(CLIPModel(vit_l()), LinearHead((768, *WIDTHS)))
        return AestheticReward(name="aesthetic", model=model, preprocess=Preprocess(size=224, rounding="half-even"))

    return Architecture(make=make, score=lambda reward, images: reward._scores(reward.preprocess(images)))


def imagereward() -> Architecture:
    """BLIP, ViT-L/16 and BERT-base."""

    def make() -> BlipReward:
        from transformers import BlipTextConfig, BlipVisionConfig

        vision = BlipVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
        )
        text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)  # the rest is BERT-base's, as it is
        return BlipReward(
            name="imagereward",
            model=BlipScorer(vision, text, (768, *WIDTHS)),
            preprocess=imagereward_preprocess(vision),
            tokenizer=None,
        )

    def score(reward: BlipReward, images: Tensor) -> Tensor:
        return reward._scores(reward.preprocess(images), random_ids(30522, len(images), BERT_TOKENS), None)

    return Architecture(make=make, score=score)


def qwen2_vl_7b(text_layers: int = 28, vision_layers: int = 32) -> Any:
    """HPSv3's backbone; fewer layers are a cut of the same width."""
    from transformers import Qwen2VLConfig

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": text_layers}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": HPSV3_VOCABULARY}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": vision_layers, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)


def hpsv3(text_layers: int = 28, vision_layers: int = 32) -> Architecture:
    """Qwen2-VL-7B with HPSv3's head."""

    def make() -> HPSv3Reward:
        from transformers import Qwen2VLModel

        return HPSv3Reward(
            name="hpsv3",
            model=HPSv3Model(Qwen2VLModel(qwen2_vl_7b(text_layers, vision_layers))),
            preprocess=QwenPreprocess(min_pixels=PIXELS, max_pixels=PIXELS),
            reward_token_id=HPSV3_VOCABULARY - 1,
            chat=None,
        )

    def score(reward: HPSv3Reward, images: Tensor) -> Tensor:
        """Ids as many as the instruction has around the picture's tokens."""
        pictures = reward.preprocess(images)
        words = torch.randint(150_000, (INSTRUCTION_TOKENS,))
        image = torch.full((pictures[0].num_tokens,), IMAGE_TOKEN)
        ids = torch.cat([words, image, torch.tensor([HPSV3_VOCABULARY - 1])])
        return reward.outputs(pictures, [ids] * len(images))[:, 0]

    return Architecture(make=make, score=score)


PUBLISHED = {
    "pickscore": clip("pickscore", vit_h),
    "hpsv2": clip("hpsv2", vit_h, pad=True),
    "clipscore": clip("clipscore", vit_l),
    "aesthetic": aesthetic(),
    "imagereward": imagereward(),
    "hpsv3": hpsv3(),
}

"""HPSv3 on the meta device, with its published sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leapalign.rewards.base import Weightless
from leapalign.rewards.hpsv3.model import PIXELS, HPSv3Model, HPSv3Reward
from leapalign.rewards.qwen_vl import QwenPreprocess

INSTRUCTION_TOKENS = 500  # approximate tokens of the instruction and a prompt
VOCABULARY = 151_658  # including <|Reward|>, the last
IMAGE_TOKEN = 151_655
ORDINARY_TOKENS = 150_000  # ids below this are not special tokens


def qwen2_vl_7b(text_layers: int = 28, vision_layers: int = 32) -> Any:
    """Return the configuration of HPSv3's backbone; fewer layers keep the width."""
    from transformers import Qwen2VLConfig

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": text_layers}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": vision_layers, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)


def hpsv3(text_layers: int = 28, vision_layers: int = 32) -> Weightless:
    """Return Qwen2-VL-7B with HPSv3's head."""

    def make() -> HPSv3Reward:
        from transformers import Qwen2VLModel

        return HPSv3Reward(
            name="hpsv3",
            model=HPSv3Model(Qwen2VLModel(qwen2_vl_7b(text_layers, vision_layers))),
            preprocess=QwenPreprocess(min_pixels=PIXELS, max_pixels=PIXELS),
            reward_token_id=VOCABULARY - 1,
            chat=None,
        )

    def score(reward: HPSv3Reward, images: Tensor) -> Tensor:
        """Score with as many ids as the instruction has around the image's tokens."""
        patches = reward.preprocess(images)
        words = torch.randint(ORDINARY_TOKENS, (INSTRUCTION_TOKENS,))
        image = torch.full((patches[0].num_tokens,), IMAGE_TOKEN)
        ids = torch.cat([words, image, torch.tensor([VOCABULARY - 1])])
        return reward.outputs(patches, [ids] * len(images))[:, 0]

    return Weightless(make=make, score=score, heads=("rm_head",))

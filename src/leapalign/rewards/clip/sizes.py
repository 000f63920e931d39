"""CLIP rewards on the meta device, with published sizes or those of a folder's config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.rewards.base import Weightless
from leapalign.rewards.clip.model import ClipReward, Head
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.pretrained import read_json
from leapalign.storage.embedded import resolve


def vit_h() -> Any:
    """Return the config of CLIP ViT-H/14: HPSv2 and PickScore."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 2},
        projection_dim=1024,
    )


def vit_l() -> Any:
    """Return the config of OpenAI's CLIP ViT-L/14: CLIPScore and the aesthetic score."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224},
        text_config={**text, "eos_token_id": 2},
        projection_dim=768,
    )


def of_folder(name: str, path: str) -> Weightless:
    """Return the cosine with the sizes of a folder's config.json. Raises UserError if it is not a CLIPModel's."""
    from transformers import CLIPConfig

    folder = resolve(path)
    config = read_json(folder, "config.json")
    if config.get("model_type") != "clip":
        raise UserError(f"{name}: {folder} has no config.json of a CLIPModel; give a folder that save_pretrained wrote")
    return cosine(name, lambda: CLIPConfig(**config))


def cosine(name: str, config: Callable[[], Any], *, pad: bool = False) -> Weightless:
    """Return a cosine of image and text. `pad`: the longest edge is resized, as for HPSv2."""
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

    return Weightless(make=make, score=score)


def random_ids(vocabulary: int, rows: int, length: int) -> Tensor:
    """Draw ids [rows, length] whose last one is the highest, as CLIP's end token is."""
    ids = torch.randint(vocabulary - 1, (rows, length))
    ids[:, -1] = vocabulary - 1
    return ids

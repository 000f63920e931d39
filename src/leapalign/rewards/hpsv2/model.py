"""Key map from open_clip to transformers' `CLIPModel`: names, fused projections, transposes.

All sizes except the number of heads follow from the weights' shapes. The heads of ViT-H/14 are known; for another
size, a config.json beside the checkpoint (as in open_clip's model_configs) states `vision_cfg.head_width` and
`text_cfg.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leapalign.errors import UserError
from leapalign.rewards.base import tried
from leapalign.rewards.checkpoint import Checkpoint, read_checkpoint, rename, whole_numbers
from leapalign.rewards.clip.model import ClipReward, Head
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.pretrained import load_tokenizer, read_json, torch_dtype
from leapalign.rewards.sources import folder_of
from leapalign.storage.embedded import resolve

if TYPE_CHECKING:
    from transformers import CLIPConfig

HEADS = {(1280, 1024): (16, 16)}  # (vision width, text width) -> heads: ViT-H/14

RULES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")  # open_clip: x @ w; Linear: x @ w.T


def load_hpsv2(
    name: str, path: str, files: Sequence[str], processor: str, device: str, dtype: str, *, prompts: bool
) -> ClipReward:
    """Load the cosine reward of an open_clip checkpoint. Raises UserError for missing, unknown or misshapen weights."""
    from transformers import CLIPModel

    target, folder = torch_dtype(name, dtype), folder_of(path)
    checkpoint = read_checkpoint(name, path, files)
    config: Any = clip_config(checkpoint, read_json(folder, "config.json"))
    model = checkpoint.fill(lambda: CLIPModel(config), from_open_clip(checkpoint.weights))
    logit_scale = math.exp(float(model.logit_scale))  # before the weights are rounded
    vocabulary = config.text_config.vocab_size
    reward = ClipReward(
        name=name,
        model=model.to(device, target),  # type: ignore[call-arg]  # transformers types it as unbound
        preprocess=Preprocess(size=config.vision_config.image_size, fit="pad"),
        head=Head(),
        logit_scale=logit_scale,
        tokenizer=load_tokenizer(name, resolve(processor), vocabulary) if prompts else None,
    )
    return tried(name, path, reward) if prompts else reward


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to `CLIPModel`'s names and shapes; an unknown key keeps its name."""
    converted = {}
    for key, weight in rename(weights, RULES).items():
        before, in_proj, kind = key.partition(".in_proj_")  # kind: weight or bias
        if in_proj:
            converted |= {f"{before}.{part}_proj.{kind}": rows for part, rows in zip("qkv", weight.chunk(3))}
        else:
            converted[key] = weight.T.contiguous() if key in TRANSPOSED else weight
    return converted


def clip_config(checkpoint: Checkpoint, told: Mapping[str, Any]) -> CLIPConfig:
    """Derive sizes from the shapes; heads and activation from `told`, an open_clip config, if given."""
    from transformers import CLIPConfig

    width, _, patch, _ = checkpoint.shape("visual.conv1.weight", 4)
    text_width, dimension = checkpoint.shape("text_projection", 2)
    vocabulary, _ = checkpoint.shape("token_embedding.weight", 2)
    heads, text_heads = _heads(checkpoint, told, width, text_width)
    # open_clip's LayerNorm has torch's own eps in both towers.
    common = {"hidden_act": "quick_gelu" if told.get("quick_gelu") else "gelu", "layer_norm_eps": 1e-5}
    vision = {
        "hidden_size": width,
        "intermediate_size": checkpoint.shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": checkpoint.count("visual.transformer.resblocks."),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": checkpoint.side(checkpoint.shape("visual.positional_embedding", 2)[0], patch),
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": checkpoint.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": checkpoint.count("transformer.resblocks."),
        "num_attention_heads": text_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": checkpoint.shape("positional_embedding", 2)[0],
        "eos_token_id": 2,  # makes transformers pool like open_clip: at the highest id, the end token
    }
    return CLIPConfig(vision_config=vision | common, text_config=text | common, projection_dim=dimension)


def _heads(checkpoint: Checkpoint, told: Mapping[str, Any], width: int, text_width: int) -> tuple[int, int]:
    """Return the number of heads of vision and text. Raises UserError if unknown."""
    name, vision, text = checkpoint.name, told.get("vision_cfg"), told.get("text_cfg")
    if isinstance(vision, dict) and isinstance(text, dict):
        (head_width,) = whole_numbers(name, "config.json, vision_cfg,", vision, "head_width")
        (text_heads,) = whole_numbers(name, "config.json, text_cfg,", text, "heads")
        if width % head_width or text_width % text_heads:
            raise UserError(
                f"{name}: config.json says head_width {head_width} and {text_heads} text heads, which do not divide "
                f"the widths {width} and {text_width} of {checkpoint.file}; use the model's own"
            )
        return width // head_width, text_heads
    if (width, text_width) not in HEADS:
        raise UserError(
            f"{name}: {checkpoint.file} is {width} wide (text {text_width}), not the published ViT-H/14, and its "
            "shapes do not tell the heads; put config.json beside it with vision_cfg.head_width and text_cfg.heads"
        )
    return HEADS[width, text_width]

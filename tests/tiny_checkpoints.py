"""Checkpoints of HPSv2, ImageReward and the aesthetic head with random weights, in the published key names and tiny."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiny_clip import IMAGE_SIZE, WORDS, write_tiny_clip, write_tokenizer

PATCH = 8
POSITIONS = (IMAGE_SIZE // PATCH) ** 2 + 1
TOKENS = (*WORDS, "<unk>", "<start>", "<end>")  # open_clip pools at the highest id, so the end token stands last
HEAD_WIDTHS = {0: 16, 2: 8, 4: 8, 6: 4, 7: 1}  # place in the Sequential -> outputs
Shapes = dict[str, tuple[int, ...]]


def write_tiny_hpsv2(folder: Path, file: str = "HPS_v2.1_compressed.pt", *, seed: int = 0) -> Path:
    """Checkpoint, open_clip configuration and tokenizer. 24 pixels, 8 tokens, width 24 and 16, feature 12."""
    folder.mkdir(exist_ok=True, parents=True)
    save(hpsv2_weights(seed), folder / file)
    config = {"vision_cfg": {"head_width": 12}, "text_cfg": {"heads": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, TOKENS)
    return folder


def hpsv2_weights(seed: int = 0) -> dict[str, Tensor]:
    shapes: Shapes = {
        "positional_embedding": (8, 16),
        "text_projection": (16, 12),
        "logit_scale": (),
        "visual.class_embedding": (24,),
        "visual.positional_embedding": (POSITIONS, 24),
        "visual.proj": (24, 12),
        "visual.conv1.weight": (24, 3, PATCH, PATCH),
        "token_embedding.weight": (len(TOKENS), 16),
        **layer("ln_final", 16),
        **layer("visual.ln_pre", 24),
        **layer("visual.ln_post", 24),
    }
    for tower, width in (("", 16), ("visual.", 24)):
        for index in range(2):
            block = f"{tower}transformer.resblocks.{index}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= layer(f"{block}.attn.out_proj", width, width)
            shapes |= layer(f"{block}.ln_1", width) | layer(f"{block}.ln_2", width)
            shapes |= layer(f"{block}.mlp.c_fc", 2 * width, width) | layer(f"{block}.mlp.c_proj", width, 2 * width)
    return random_weights(shapes, seed)


def write_tiny_imagereward(folder: Path, file: str = "ImageReward.pt", *, seed: int = 0) -> Path:
    """Checkpoint, heads and tokenizer. 24 pixels, 40 positions, width 24 and 16."""
    folder.mkdir(exist_ok=True, parents=True)
    save(imagereward_weights(seed), folder / file)
    (folder / "config.json").write_text(
        json.dumps({"vision": {"num_heads": 2}, "text": {"num_attention_heads": 2}}),
    )
    write_tokenizer(folder)
    return folder


def imagereward_weights(seed: int = 0) -> dict[str, Tensor]:
    image, words = "blip.visual_encoder", "blip.text_encoder"
    shapes: Shapes = {
        f"{image}.cls_token": (1, 1, 24),
        f"{image}.pos_embed": (1, POSITIONS, 24),
        f"{image}.patch_embed.proj.weight": (24, 3, PATCH, PATCH),
        f"{image}.patch_embed.proj.bias": (24,),
        f"{words}.embeddings.word_embeddings.weight": (len(WORDS) + 3, 16),
        f"{words}.embeddings.position_embeddings.weight": (40, 16),
        **layer(f"{image}.norm", 24),
        **layer(f"{words}.embeddings.LayerNorm", 16),
        **layer("blip.vision_proj", 4, 24),
        **layer("blip.text_proj", 4, 16),
        **head_shapes(16, "mlp."),
    }
    for index in range(2):
        block = f"{image}.blocks.{index}"
        shapes |= layer(f"{block}.norm1", 24) | layer(f"{block}.norm2", 24)
        shapes |= layer(f"{block}.attn.qkv", 72, 24) | layer(f"{block}.attn.proj", 24, 24)
        shapes |= layer(f"{block}.mlp.fc1", 48, 24) | layer(f"{block}.mlp.fc2", 24, 48)
        block = f"{words}.encoder.layer.{index}"
        for attention, inputs in (("attention", 16), ("crossattention", 24)):
            shapes |= layer(f"{block}.{attention}.self.query", 16, 16)
            shapes |= layer(f"{block}.{attention}.self.key", 16, inputs)
            shapes |= layer(f"{block}.{attention}.self.value", 16, inputs)
            shapes |= layer(f"{block}.{attention}.output.dense", 16, 16)
            shapes |= layer(f"{block}.{attention}.output.LayerNorm", 16)
        shapes |= layer(f"{block}.intermediate.dense", 32, 16) | layer(f"{block}.output.dense", 16, 32)
        shapes |= layer(f"{block}.output.LayerNorm", 16)
    position_ids = {f"{words}.embeddings.position_ids": torch.arange(40)[None]}
    return random_weights(shapes, seed) | position_ids


def write_tiny_aesthetic(folder: Path, file: str = "sac+logos+ava1-l14-linearMSE.pth", *, seed: int = 0) -> Path:
    """A CLIPModel folder (quick_gelu) and the head's file beside it."""
    folder.mkdir(exist_ok=True, parents=True)
    write_tiny_clip(folder)
    save(random_weights(head_shapes(12), seed), folder / file)
    return folder


def head_shapes(inputs: int, before: str = "") -> Shapes:
    shapes: Shapes = {}
    for place, outputs in HEAD_WIDTHS.items():
        shapes |= layer(f"{before}layers.{place}", outputs, inputs)
        inputs = outputs
    return shapes


def layer(name: str, *shape: int) -> Shapes:
    """Weight and bias of a linear layer (outputs, inputs) or a norm (width,)."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def random_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Large enough for pictures and prompts to be told apart."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        fan_in = 1 if "embed" in key and len(shape) < 4 else max(1, torch.Size(shape[1:]).numel())
        weights[key] = torch.randn(shape, generator=generator) * (1.5 / fan_in**0.5 if len(shape) > 1 else 0.1)
        if len(shape) == 1 and key.endswith("weight"):
            weights[key] += 1
    return weights


def save(weights: dict[str, Tensor], file: Path) -> None:
    """As published: HPSv2 has its weights under `state_dict`, the others have them at the top."""
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"epoch": 3, "state_dict": weights} if file.name.startswith("HPS") else weights, file)

"""Random pipeline folders of the real classes, small enough for tests, with tokenizers built from nothing (no hub).

Every quantity that a careless adapter could forget is away from its neutral value: shifts, VAE scale and shift,
re-initialised output layers (diffusers starts some at zero, which would hide every error behind a zero velocity).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = [
    *("a", "an", "the", "red", "green", "blue", "circle", "square", "star", "left", "right", "of"),
    *("above", "below", "and", "two", "three", "photo", "blurry"),
]
CLIP_LENGTH = 12
T5_LENGTH = 5


def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Fill every parameter from one generator: matrices scaled by fan-in, vectors small; nothing stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(draw * gain / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Whole words through merges, the rest letter by letter."""
    vocab: dict[str, int] = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    letters = [chr(c) for c in range(33, 127)]
    for token in [*letters, *(c + "</w>" for c in letters)]:
        vocab.setdefault(token, len(vocab))
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS] + [(chr(c), -9.0) for c in range(97, 123)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=CLIP_LENGTH)


def clip_text(tokenizer: CLIPTokenizer, kind: type, width: int, seed: int) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, hidden_act="quick_gelu",
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return randomise(kind(config), seed)


def t5(tokenizer: T5Tokenizer, width: int, seed: int) -> nn.Module:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return randomise(T5EncoderModel(config), seed)


def vae(seed: int) -> nn.Module:
    """Factor 2, 4 channels, images well inside and well outside of [0, 1]."""
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.7, shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return randomise(model, seed)


def sd3_pipeline(
    *, with_t5: bool = True, layers: int = 2, joint_width: int = 32, seed: int = 0
) -> StableDiffusion3Pipeline:
    """CLIP + CLIP + T5 (or none), patch 2, dual attention in the first block as in SD3.5-M, shift 3."""
    tokenizer = clip_tokenizer()
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=joint_width, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer, seed + 1, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed + 2),
        text_encoder=clip_text(tokenizer, CLIPTextModelWithProjection, 8, seed + 3),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, CLIPTextModelWithProjection, 16, seed + 4),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(tokenizer_3, joint_width, seed + 5) if tokenizer_3 is not None else None,
        tokenizer_3=tokenizer_3,
    )


def flux_pipeline(*, guidance_embeds: bool = True, seed: int = 10) -> FluxPipeline:
    """CLIP + T5, two double and two single blocks, dynamic shift as in FLUX.1-dev (without: schnell's layout)."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=8, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        transformer=randomise(transformer, seed + 1, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds,
            base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=1.15,
        ),
        vae=vae(seed + 2),
        text_encoder=clip_text(tokenizer, CLIPTextModel, 8, seed + 3),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, 32, seed + 4),
        tokenizer_2=tokenizer_2,
    )  # fmt: skip


def save(pipeline: StableDiffusion3Pipeline | FluxPipeline, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)

"""Random pipeline folders of the real classes, small enough for tests, with tokenizers built from nothing (no hub).

Every quantity that a careless adapter could forget is away from its neutral value: shifts, VAE scale and shift,
re-initialised output layers (diffusers starts some at zero, which would hide every error behind a zero velocity).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = [
    *("a", "an", "the", "red", "green", "blue", "circle", "square", "star", "left", "right", "of"),
    *("above", "below", "and", "two", "three", "photo", "blurry"),
]
CHAT_WORDS = [  # of the chat format and of Qwen-Image's system prompt, which must have 34 tokens as published
    *("system", "user", "assistant", "think", "Describe", "image", "by", "detailing", "color", "shape", "size"),
    *("texture", "quantity", "text", "spatial", "relationships", "objects", "background"),
]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
CHAT_TEMPLATE = (  # as Qwen3's without tools and history: an empty thought where thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
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


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Whole words with or without a space before them, the rest byte by byte; in the chat format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=5000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learner.train_from_iterator([form for word in [*WORDS, *CHAT_WORDS] for form in (word, " " + word)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = {"<|endoftext|>": 0} | {token: 1 + i for token, i in learnt["vocab"].items()}
    merges = [(a, b) for a, b in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens(CHAT_TOKENS, special_tokens=True)
    return tokenizer


LANGUAGE_MODEL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip


def qwen3(tokenizer: Qwen2Tokenizer, kind: type, seed: int) -> nn.Module:
    """Four layers of 16 features, word embedding and output tied as in Qwen3-4B."""
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=8, tie_word_embeddings=True, **LANGUAGE_MODEL)
    return randomise(kind(config), seed, gain=1.5)


def qwen2_5_vl(tokenizer: Qwen2Tokenizer, seed: int) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}  # half of a head's 8 numbers
    vision = {
        "depth": 1, "num_heads": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = dict(zip(("image_token_id", "vision_start_token_id", "vision_end_token_id"), range(3, 6)))
    text = LANGUAGE_MODEL | {
        "vocab_size": len(tokenizer),
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return randomise(Qwen2_5_VLForConditionalGeneration(config), seed, gain=1.5)


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


def flux2_vae(seed: int) -> nn.Module:
    """As `vae`, with statistics of a batch norm over 2 x 2 patches of its latents, far from 0 and 1."""
    model = AutoencoderKLFlux2(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model.bn.running_mean.normal_(generator=generator)
    model.bn.running_var.uniform_(0.2, 3.0, generator=generator)
    return randomise(model, seed)


def qwen_vae(seed: int) -> nn.Module:
    """Factor 2, up in time and space at once, as the published one does twice."""
    model = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 1.5, 0.4], latents_std=[2.8, 0.6, 1.2, 1.9],
    )  # fmt: skip
    return randomise(model, seed, gain=1.5)


def sd3_pipeline(
    *,
    with_t5: bool = True,
    layers: int = 2,
    joint_width: int = 32,
    dual: tuple[int, ...] = (0,),
    qk_norm: str | None = "rms_norm",
    head_dim: int = 8,
    clip_widths: tuple[int, int] = (8, 16),
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """CLIP + CLIP + T5 (or none), patch 2, shift 3.

    Layouts: SD3.5-M has dual attention in its first blocks and normalised queries and keys (the default here), SD3.5-L
    no dual attention, SD3-M neither.
    """
    tokenizer = clip_tokenizer()
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=2, joint_attention_dim=joint_width, caption_projection_dim=2 * head_dim,
        pooled_projection_dim=sum(clip_widths), pos_embed_max_size=16, dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer, seed + 1, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed + 2),
        text_encoder=clip_text(tokenizer, CLIPTextModelWithProjection, clip_widths[0], seed + 3),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, CLIPTextModelWithProjection, clip_widths[1], seed + 4),
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


def flux2_pipeline(*, distilled: bool = False, seed: int = 20) -> Flux2KleinPipeline:
    """Qwen3 of four layers, three of them seen; two double and two single blocks, four axes of positions."""
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return Flux2KleinPipeline(
        transformer=randomise(transformer, seed + 1, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(seed + 2),
        text_encoder=qwen3(tokenizer, Qwen3ForCausalLM, seed + 3),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )


def qwen_image_pipeline(*, seed: int = 30) -> QwenImagePipeline:
    """Qwen2.5-VL and two blocks; dynamic shift and a last sigma of 0.02 as published."""
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=randomise(transformer, seed + 1, gain=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=0.9,
            shift_terminal=0.02,
        ),
        vae=qwen_vae(seed + 2),
        text_encoder=qwen2_5_vl(tokenizer, seed + 3),
        tokenizer=tokenizer,
    )  # fmt: skip


def z_image_pipeline(*, dynamic: bool = False, seed: int = 40) -> ZImagePipeline:
    """Qwen3, one refining block for each of noise and caption, two for both; static shift 3 as published."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=randomise(transformer, seed + 1),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=16, max_image_seq_len=64
        ),
        vae=vae(seed + 2),
        text_encoder=qwen3(tokenizer, Qwen3Model, seed + 3),
        tokenizer=tokenizer,
    )


def save(pipeline: DiffusionPipeline, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)

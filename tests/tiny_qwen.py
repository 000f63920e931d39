"""Qwen2-VL and Qwen2.5-VL folders with random weights and a byte-level tokenizer: real classes, milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # half of a head's 16 numbers
VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
ANSWER = "Alignment Score (1-5): {:.1f}\nCoherence Score (1-5): {:.1f}\nStyle Score (1-5): {:.2f}\n"


def write_tiny_hpsv3(folder: Path, *, seed: int = 1) -> Path:
    """HPSv3.safetensors under the published names, with config.json and tokenizer of a Qwen2-VL beside it."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    from leapalign.rewards.hpsv3.model import HPSv3Model

    tokenizer = write_tokenizer(folder, "hpsv3/prompt.txt")
    text = TEXT | {"rope_parameters": dict(ROPE), "vocab_size": len(tokenizer) + 50}  # more rows than the weights
    vision = VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))
    config.save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1  # <|Reward|>
    torch.manual_seed(seed)
    model = HPSv3Model(Qwen2VLModel(config))
    enlarge(model.backbone, 8.0)
    enlarge(model.rm_head, 3.0)
    names = {key: published(key) for key in model.state_dict()}
    weights = {names[key]: value.clone() for key, value in model.state_dict().items()}
    weights["lm_head.weight"] = torch.zeros(len(tokenizer) + 1, 32)
    save_file(weights, folder / "HPSv3.safetensors")
    return folder


def write_tiny_unified(folder: Path, *, seed: int = 39, talks: bool = True) -> Path:
    """A Qwen2.5-VL. `talks`: every token that it can choose is a whole answer, so that a random model is understood.

    Of the seeds 0 to 39 the last is the one whose answers to the contracts' pictures and prompts all differ.
    """
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    answers = [ANSWER.format(1 + n / 10, 5 - n / 10, 3 + n / 50) for n in range(41)] if talks else []
    tokenizer = write_tokenizer(folder, "unified/prompt_1.txt", added=answers)
    text = TEXT | {"rope_parameters": dict(ROPE), "vocab_size": len(tokenizer)}
    vision = VISION | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    enlarge(model, 8.0)
    if talks:
        with torch.no_grad():
            model.lm_head.weight[: -len(answers)] = 0
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=end)
    model.save_pretrained(folder)
    return folder


def published(key: str) -> str:
    return key.removeprefix("backbone.").replace("language_model.", "model.")


def write_tokenizer(folder: Path, template: str, added: Sequence[str] = ()) -> Any:
    """Byte-level BPE, learnt from the template, so that its chat text has hundreds of tokens and not thousands."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    import leapalign.rewards
    from leapalign.rewards.qwen_vl import read_template

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([read_template(Path(leapalign.rewards.__path__[0], template))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    return fast


def token_ids(tokenizer: Any) -> dict[str, int]:
    """config.json's numbers of the special tokens."""
    names = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    names |= {"vision_end_token_id": "<|vision_end|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def enlarge(model: torch.nn.Module, factor: float) -> None:
    """transformers starts with weights so small that all pictures look alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)

"""A CLIPModel folder with random weights and a tokenizer of a few words: real classes, milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "right", "of", "photo", "depicts", "A", "two"]
IMAGE_SIZE = 24  # pixels; the pictures in the tests have other sizes, so that preprocessing matters
TEXT_LENGTH = 8  # tokens, start and end included


def write_tiny_clip(folder: Path, *, seed: int = 0, image_size: int = IMAGE_SIZE) -> Path:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**text, **ends, "vocab_size": len(WORDS) + 3, "max_position_embeddings": TEXT_LENGTH},
        vision_config={**vision, "image_size": image_size, "patch_size": 8},
        projection_dim=12,
        logit_scale_init_value=3.7,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():  # transformers starts with weights so small that all pictures look alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "embedding" in name else 2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, tokens: Sequence[str] = ("<start>", "<end>", "<unk>", *WORDS)) -> None:
    """A word is a token; the id of a token is its place."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, vocabulary[token]) for token in ("<start>", "<end>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)

"""Tokenizers of ShapeWorld's thirty words, and the small text encoders of an SD3 pipeline.

Two CLIP towers read the whole caption in at most 12 tokens; T5 reads only its content words, at most 5 tokens, so that
the joint attention stays short.
"""

# diffusers and transformers annotate some constructors more narrowly than they accept
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from leapalign.geneval.wording import plural
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.world import COLORS, SHAPES

CLIP_LENGTH, T5_LENGTH = 12, 5
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WIDTH = 64  # of each CLIP tower; T5 and the joint attention take their sum


def words() -> list[str]:
    """Return every word of the captions."""
    counted = [plural(s) for s in SHAPES]
    relations = [word for relation in c.RELATIONS for word in relation.split()]
    return sorted({"a", "an", "photo", "of", "and", *COLORS, *SHAPES, *counted, *relations, *c.NUMBERS.values()})


def clip_tokenizer(length: int = CLIP_LENGTH) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learnt on the world's words: each is one token, others are spelled.

    The same at every call: letters that end a word are named to the trainer, which would number them as it meets them,
    in the random order of its hash table, and break ties between merges by these numbers.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=[f"{letter}</w>" for letter in letters],
        show_progress=False,
    )
    bpe.train_from_iterator(words() * 2, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    vocab = {token: i for i, token in enumerate([*state["vocab"], BOS, EOS])}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS, model_max_length=length
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer without uninformative words; unknown words are `<unk>`."""
    dull = {"a", "an", "photo", "of", "and"}
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *(w for w in words() if w not in dull)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    remove = normalizers.Replace(Regex(rf"\b({'|'.join(sorted(dull))})\b"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), remove])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=T5_LENGTH
    )


def clip_text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class TextEncoders(nn.Module):
    """The three text encoders, trained with the transformer; makes the same tensors as SD3's `encode_prompt`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_3 = clip_tokenizer(), t5_tokenizer()
        self.clip_1 = CLIPTextModelWithProjection(clip_text_config(self.tokenizer, WIDTH, 2, WIDTH))
        self.clip_2 = CLIPTextModelWithProjection(clip_text_config(self.tokenizer, WIDTH, 2, WIDTH))
        t5 = T5Config(
            vocab_size=len(self.tokenizer_3),
            d_model=2 * WIDTH,
            d_kv=32,
            d_ff=4 * WIDTH,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
        self.t5 = T5EncoderModel(t5)

    def token_ids(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> CLIP ids [B, 12], T5 ids [B, 5]."""
        clip = self.tokenizer(prompts, padding="max_length", max_length=CLIP_LENGTH, truncation=True)["input_ids"]
        t5 = self.tokenizer_3(prompts, padding="max_length", max_length=T5_LENGTH, truncation=True)["input_ids"]
        return torch.tensor(clip), torch.tensor(t5)

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> joint text tokens [B, 17, 128] and pooled text [B, 128]."""
        towers = [clip(clip_ids, output_hidden_states=True) for clip in (self.clip_1, self.clip_2)]
        tokens = torch.cat([tower.hidden_states[-2] for tower in towers], dim=-1)
        pooled = torch.cat([tower.text_embeds for tower in towers], dim=-1)
        return torch.cat([tokens, self.t5(t5_ids)[0]], dim=1), pooled

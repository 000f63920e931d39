"""Which linear layers get an adapter: by default attention and feed-forward of every block, by family.

Names are those of diffusers' transformers. Embeddings, modulation and the last projection are left out: they are small,
shared by all tokens, and what public LoRA recipes leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from leapalign.codec import suggestion
from leapalign.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

DEFAULTS: dict[str, tuple[str, ...]] = {  # class of the transformer -> ends of module paths; * is any text
    # attn2: the second attention over image tokens of SD3.5-M; SD3-M and SD3.5-L have none
    "SD3Transformer2DModel": (*_ATTENTION, *_TEXT, *_FEED_FORWARD, "attn2.to_*"),
    # proj_mlp and proj_out are the single blocks' feed-forward; the whole path keeps the model's last proj_out out
    "FluxTransformer2DModel": (
        *_ATTENTION,
        *_TEXT,
        *_FEED_FORWARD,
        "single_transformer_blocks.*.proj_mlp",
        "single_transformer_blocks.*.proj_out",
    ),
    "Flux2Transformer2DModel": (
        *_ATTENTION,
        *_TEXT,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"),
    ),
    "QwenImageTransformer2DModel": (
        *_ATTENTION,
        *_TEXT,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    "ZImageTransformer2DModel": (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
}
_OPTIONAL = {"attn2.to_*"}  # defaults that not every member of a family has


def find_targets(policy: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` mean; empty = the family's default. UserError where one has none.

    A target is the end of a module's path, as peft has it ("to_q", "attn.to_q"), or its whole; * stands for any text.
    """
    layers = linear_layers(policy)
    wanted = tuple(targets) or _defaults(policy)
    for target in wanted:
        if not any(_matches(layer, target) for layer in layers) and not (not targets and target in _OPTIONAL):
            raise UserError(
                f"target_modules: no linear layer of {type(policy).__name__} is named {target!r}"
                f"{suggestion(target, endings(layers))}; there are {', '.join(endings(layers))}"
            )
    return [layer for layer in layers if any(_matches(layer, target) for target in wanted)]


def linear_layers(policy: nn.Module) -> list[str]:
    """Full names, in the model's order; quantised linear layers are linear layers too."""
    from torch import nn

    return [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]


def endings(layers: Sequence[str]) -> list[str]:
    """What is left of the names behind the block's number: short, and each once."""
    return list(dict.fromkeys(_ending(layer) for layer in layers))


def _ending(layer: str) -> str:
    """transformer_blocks.3.ff.net.2 -> ff.net.2"""
    parts = layer.split(".")
    return ".".join(parts[2:]) if len(parts) > 2 and parts[1].isdigit() else layer


def _matches(layer: str, target: str) -> bool:
    return fnmatchcase(layer, target) or fnmatchcase(layer, f"*.{target}")


def _defaults(policy: nn.Module) -> tuple[str, ...]:
    family = type(policy).__name__
    if family not in DEFAULTS:
        raise UserError(
            f"target_modules: there is no default for {family}, only for {', '.join(DEFAULTS)}; name the layers, "
            f"for instance some of {', '.join(endings(linear_layers(policy)))}"
        )
    return DEFAULTS[family]

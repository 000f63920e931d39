"""Select the linear layers that get an adapter: those that the user names, else the model family's default.

Names are those of diffusers' transformers. A family's default is attention and feed-forward of every block, without
embeddings, modulation and the last projection: these are small and shared by all tokens, and public LoRA recipes leave
them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from leapalign.codec import suggestion
from leapalign.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# Names that several of diffusers' transformers share.
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True, kw_only=True)
class LoraTargets:
    """A family's default layers, as ends of module paths; * matches any text."""

    layers: tuple[str, ...]
    optional: tuple[str, ...] = ()  # further layers that some members of the family lack


NO_DEFAULT = LoraTargets(layers=())


def find_targets(policy: nn.Module, targets: Sequence[str], default: LoraTargets = NO_DEFAULT) -> list[str]:
    """List the full names of the linear layers that `targets` select; empty `targets`: those of the default.

    A target is a module's path or the end of one, as in peft ("to_q", "attn.to_q"); * matches any text.
    Raises UserError if a target selects no linear layer, or if there is no default.
    """
    layers = linear_layers(policy)
    wanted, optional = (tuple(targets), ()) if targets else (default.layers, default.optional)
    if not wanted:
        raise UserError(
            f"target_modules: the family of {type(policy).__name__} has no default; name the layers, "
            f"for instance some of {', '.join(endings(layers))}"
        )
    for target in wanted:
        if not any(_matches(layer, target) for layer in layers):
            raise UserError(
                f"target_modules: no linear layer of {type(policy).__name__} is named {target!r}"
                f"{suggestion(target, endings(layers))}; it has {', '.join(endings(layers))}"
            )
    return [layer for layer in layers if any(_matches(layer, target) for target in (*wanted, *optional))]


def linear_layers(policy: nn.Module) -> list[str]:
    """List the full names of all linear layers, quantised ones too, in the model's order."""
    from torch import nn

    return [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]


def endings(layers: Sequence[str]) -> list[str]:
    """List the distinct names of layers within their block."""
    return list(dict.fromkeys(_ending(layer) for layer in layers))


def _ending(layer: str) -> str:
    """Remove list and index of the block: transformer_blocks.3.ff.net.2 -> ff.net.2."""
    parts = layer.split(".")
    return ".".join(parts[2:]) if len(parts) > 2 and parts[1].isdigit() else layer


def _matches(layer: str, target: str) -> bool:
    return fnmatchcase(layer, target) or fnmatchcase(layer, f"*.{target}")

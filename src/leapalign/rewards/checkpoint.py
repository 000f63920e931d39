"""Single-file published checkpoints: find, read without unpickling, rename keys, load strictly into a model.

Model sizes follow from the weights' shapes, so a small copy of an architecture needs no code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from leapalign.errors import UserError, is_out_of_memory, opening
from leapalign.rewards.pretrained import find

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one file, with names for messages."""

    name: str  # name of the reward
    file: str
    weights: Mapping[str, Tensor]

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Shape of a required weight. Raises UserError if it is missing or has another number of axes."""
        if key not in self.weights:
            raise UserError(
                f"{self.name}: {self.file} has no weight {key}, but {len(self.weights)} others, e.g. "
                f"{min(self.weights)}; expected the published checkpoint with its original key names"
            )
        shape = tuple(self.weights[key].shape)
        if len(shape) != axes:
            raise UserError(f"{self.name}: {self.file}: {key} has shape {list(shape)}; expected {axes} axes")
        return shape

    def count(self, before: str) -> int:
        """Number of layers whose keys start with `before` and an index."""
        found = (re.match(re.escape(before) + r"(\d+)\.", key) for key in self.weights)
        return len({match[1] for match in found if match})

    def side(self, positions: int, patch: int) -> int:
        """Side in pixels of a ViT's square image, from its number of positions (class token included)."""
        side = math.isqrt(max(0, positions - 1))
        if not side or side**2 != positions - 1:
            raise UserError(f"{self.name}: {self.file} has {positions - 1} patch positions, which do not form a square")
        return side * patch

    def fill(self, build: Callable[[], M], weights: Mapping[str, Tensor]) -> M:
        """Build the model with exactly these weights: float32, frozen, eval mode. Raises UserError on any mismatch."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):  # weights on the meta device, buffers initialised
            model = build()
        shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
        self._agree(shapes, {key: tuple(weight.shape) for key, weight in weights.items()})
        model.load_state_dict({key: weight.float() for key, weight in weights.items()}, assign=True)
        return model.requires_grad_(False).eval()

    def _agree(self, expected: Mapping[str, tuple[int, ...]], came: Mapping[str, tuple[int, ...]]) -> None:
        other = [key for key in expected if key in came and came[key] != expected[key]]
        problems = {
            "lacks": sorted(expected.keys() - came.keys()),
            "has no place for": sorted(came.keys() - expected.keys()),
            "has another shape for": [f"{key} {list(came[key])} instead of {list(expected[key])}" for key in other],
        }
        named = "; ".join(f"{what} {len(keys)} weights, e.g. {keys[0]}" for what, keys in problems.items() if keys)
        if named:
            raise UserError(f"{self.name}: {self.file} does not fill the model: it {named} (transformers' key names)")


def read_checkpoint(name: str, path: str, files: Sequence[str]) -> Checkpoint:
    """Read the file `path`, or the first of `files` in the folder or hub id `path`. Raises UserError."""
    file = locate(name, path, files)
    return Checkpoint(name=name, file=file, weights=read_weights(name, file))


def locate(name: str, path: str, files: Sequence[str]) -> str:
    if Path(path).is_file():
        return path
    for file in files:
        if found := find(path, file):
            return found
    raise UserError(
        f"{name}: no checkpoint at {path!r}; expected the file itself, or a folder or hub id that has "
        f"{' or '.join(files)}; a hub id must be reachable (HF_HUB_OFFLINE=1 forbids it)"
    )


def read_weights(name: str, file: str) -> dict[str, Tensor]:
    """Read name -> tensor from safetensors or torch's format, from the entry `state_dict` if there is one."""
    content = _safetensors(name, file) if file.endswith(".safetensors") else _torch(name, file)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(
            f"{name}: {file} has no table of weights; expected names and tensors, at the top or under 'state_dict'"
        )
    return weights


def _safetensors(name: str, file: str) -> Any:
    from safetensors.torch import load_file

    with opening(f"{name}: {file} is not readable as safetensors", "fetch it again"):
        return load_file(file)


def _torch(name: str, file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for truncated files and other content
        if is_out_of_memory(error):
            raise
        # torch's own message suggests unpickling, which would run code from the file
        raise UserError(
            f"{name}: {file} cannot be read as a file of tensors alone ({type(error).__name__}). It is broken, or it "
            "holds other Python objects, which are never unpickled here: fetch it again, or convert it to safetensors"
        ) from error


def rename(weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply the key map `rules` (regular expression, replacement), in order, to each name."""
    renamed = {}
    for key, weight in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = weight
    return renamed


def whole_numbers(name: str, where: str, config: Mapping[str, Any], *keys: str) -> tuple[int, ...]:
    """Return positive integers of a config.json object. Raises UserError if one is missing or invalid."""
    values = tuple(config.get(key) for key in keys)
    if not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"{name}: {where} says {dict(zip(keys, values))}; expected positive whole numbers")
    return values  # type: ignore[return-value]

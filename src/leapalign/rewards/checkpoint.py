"""Published checkpoints of one file: found, read without unpickling, renamed, put into a model that they must fill.

The sizes of a model come from the shapes of its weights, so that a small copy of an architecture needs no code.
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
    """The weights of one file, and the names that messages need."""

    name: str  # of the reward
    file: str
    weights: Mapping[str, Tensor]

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Of a weight that must be there with so many axes."""
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
        """The number of layers whose keys start with `before` and a number."""
        found = (re.match(re.escape(before) + r"(\d+)\.", key) for key in self.weights)
        return len({match[1] for match in found if match})

    def side(self, positions: int, patch: int) -> int:
        """Side in pixels of the square image of a ViT with that many positions, the class token's included."""
        side = math.isqrt(max(0, positions - 1))
        if not side or side**2 != positions - 1:
            raise UserError(f"{self.name}: {self.file} has {positions - 1} patch positions, which make no square")
        return side * patch

    def fill(self, build: Callable[[], M], weights: Mapping[str, Tensor]) -> M:
        """The model of `build` with exactly these weights in float32, frozen, in eval mode; nothing stays random."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):  # weights without memory, buffers as they are
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
    """The file `path` itself, or the first of `files` in the folder or hub id `path`."""
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
    """Names to tensors, of safetensors or of torch's format; a dict under `state_dict` counts as the file's content."""
    content = _safetensors(name, file) if file.endswith(".safetensors") else _torch(name, file)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(
            f"{name}: {file} holds no table of weights; expected names and tensors, at the top or under 'state_dict'"
        )
    return weights


def _safetensors(name: str, file: str) -> Any:
    from safetensors.torch import load_file

    with opening(f"{name}: {file} is not readable as safetensors", "fetch it again"):
        return load_file(file)


def _torch(name: str, file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # for other objects, half a file, and what is no checkpoint at all: of any kind
        if is_out_of_memory(error):
            raise
        # Torch's own message recommends to unpickle, which would run whatever code the file contains.
        raise UserError(
            f"{name}: {file} cannot be read as a file of tensors alone ({type(error).__name__}). It is broken, or it "
            "holds other Python objects, which are never unpickled here: fetch it again, or convert it to safetensors"
        ) from error


def rename(weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The same weights under other names: each regular expression of `rules` in turn is replaced in each name."""
    renamed = {}
    for key, weight in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = weight
    return renamed


def whole_numbers(name: str, where: str, config: Mapping[str, Any], *keys: str) -> tuple[int, ...]:
    """Positive integers of a config.json's object."""
    values = tuple(config.get(key) for key in keys)
    if not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"{name}: {where} says {dict(zip(keys, values))}; expected positive whole numbers")
    return values  # type: ignore[return-value]

"""An adapter file that training begins with: its layout, its strength, and whether it is the run's adapter.

Design choices:
- three layouts are read: diffusers' (`transformer.<layer>.lora_A.weight`), PEFT's (`base_model.model.<layer>...`, with
  its adapter_config.json), and those that diffusers' own loader of the family converts, kohya's for instance;
- rank and layers must be the run's; another strength (alpha / rank) is taken into B, so that B A keeps its effect;
- layout and rank are checked before the base is loaded, layers and values after it;
- only safetensors files are opened, never pickled ones.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.storage.hub import is_hub_id, snapshot
from leapalign.storage.safetensors_header import check_safetensors, read_header
from leapalign.tuning.adapter import ADAPTER, lora_layers
from leapalign.tuning.files import FILE, PREFIX
from leapalign.tuning.targets import endings

PEFT_PREFIX = "base_model.model."
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ENDS = (".lora_A.weight", ".lora_B.weight")
# Values of PEFT's init_lora_weights that leave the base as it is; the others change it.
BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal")
LAYOUTS = (
    "supported are diffusers' layout (transformer.<layer>.lora_A.weight), PEFT's "
    "(base_model.model.<layer>.lora_A.weight, with its adapter_config.json), and what diffusers' load_lora_weights "
    "converts for this family"
)


@dataclass(frozen=True)
class Adapter:
    """Tensors `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r], and what their strength follows."""

    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # PEFT's: lora_alpha, alpha_pattern, use_rslora
    alphas: dict[str, float] = field(default_factory=dict)  # layer -> alpha, where the file says it for each layer

    def scale(self, layer: str) -> float:
        """The factor of B A; 1 where nothing is said, as in diffusers."""
        from peft.utils.other import get_pattern_key

        rank = self.state[layer + ENDS[0]].shape[0]
        alpha = self.alphas.get(layer, self.config.get("lora_alpha", rank))
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), alpha)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@torch.no_grad()
def begin_with(policy: nn.Module, start: str) -> None:
    """Put the values of the adapter file or folder `start` into the policy's adapter.

    The policy then computes what the base computes with this adapter loaded by diffusers' load_lora_weights. UserError
    unless the file is an adapter of the same rank on the same layers with finite values.
    """
    file = adapter_file(start)
    adapter = _read(file, type(policy).__name__)
    layers = lora_layers(policy)
    _check_layers(file, adapter, layers)
    for name, layer in layers.items():
        own = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        A, B = (adapter.state[name + end] for end in ENDS)
        _check_shapes(file, name, (A, B), own)
        factor = _scale(file, adapter, name) / layer.scaling[ADAPTER]
        own[0].copy_(A)
        own[1].copy_(B.float() * factor)


def adapter_file(start: str) -> Path:
    """Return the .safetensors file that `start` names, or the adapter in the folder or hub repository that it names.

    Raises UserError.
    """
    path = Path(start).expanduser()
    if on_hub(start):
        path = snapshot(start, [FILE, PEFT_FILE, PEFT_CONFIG])
        if not any((path / name).is_file() for name in (FILE, PEFT_FILE)):
            raise UserError(
                f"tuning.start {start}: the repository has no {FILE} and no {PEFT_FILE}; fetch its adapter "
                f"(`hf download {start} FILE`) and give that file"
            )
    if path.is_dir():
        known = [path / name for name in (FILE, PEFT_FILE) if (path / name).is_file()]
        found = known[:1] or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UserError(
                f"tuning.start {path}: expected {FILE}, {PEFT_FILE} or one .safetensors file in this folder, found "
                f"{', '.join(file.name for file in found[:3]) or 'none'}; give the file itself"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tuning.start {path}: file not found; give a LoRA's .safetensors file, its folder or its hub id"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"tuning.start {path}: only .safetensors is opened, pickled weights are not; convert it")
    check_safetensors(path)
    return path


def on_hub(start: str) -> bool:
    """Return True if `start` means a hub repository; the name of a file that is not there does not."""
    path = Path(start).expanduser()
    return not path.exists() and path.suffix != ".safetensors" and is_hub_id(start)


def check_start(start: str, rank: int, transformer: str) -> None:
    """Check an adapter's layout and rank, which needs no base. `transformer`: the class of the base's.

    Raises UserError. `begin_with` compares layers, shapes and values with the run's adapter.
    """
    file = adapter_file(start)
    for key, value in _read(file, transformer).state.items():
        if key.endswith(ENDS[0]) and value.ndim:
            _check_rank(file, key.removesuffix(ENDS[0]), len(value), rank)


def _read(file: Path, transformer: str) -> Adapter:
    from safetensors.torch import load_file

    tensors = load_file(file)
    if not tensors:
        raise UserError(f"tuning.start {file} is empty: {LAYOUTS}")
    if text := [key for key in tensors if key.startswith(("text_encoder", "lora_te"))]:
        raise UserError(
            f"tuning.start {file} changes a text encoder too (e.g. {text[0]}), and text encoders stay as they are; "
            "give a LoRA of the transformer alone"
        )
    for prefix in (PREFIX, PEFT_PREFIX):
        if all(key.startswith(prefix) and key.endswith(ENDS) for key in tensors):
            state = {key.removeprefix(prefix): value for key, value in tensors.items()}
            return Adapter(state, _config(file, needed=prefix == PEFT_PREFIX))
    return _converted(file, tensors, transformer)


def _config(file: Path, needed: bool) -> dict[str, Any]:
    """PEFT's settings of the adapter: from the file's metadata, as diffusers writes them, or adapter_config.json."""
    beside = file.parent / PEFT_CONFIG
    text = read_header(file).get("__metadata__", {}).get("lora_adapter_metadata")
    if text is None and needed and not beside.is_file():
        raise UserError(f"tuning.start {file} is in PEFT's layout, whose alpha is in {beside}; that file is missing")
    try:
        if text is None:
            text = beside.read_text(encoding="utf-8") if needed else "{}"
        config = {key.removeprefix(PREFIX): value for key, value in json.loads(text).items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"tuning.start {file}: the settings of the adapter cannot be read ({error})") from error
    if config.get("use_dora"):
        raise UserError(f"tuning.start {file} is a DoRA, which also scales the base's weights; give a plain LoRA")
    if config.get("init_lora_weights") not in BASE_KEPT:
        raise UserError(
            f"tuning.start {file}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base's "
            "weights too; give a LoRA over the unchanged base"
        )
    return config


def _converted(file: Path, tensors: dict[str, Tensor], transformer: str) -> Adapter:
    """Convert the file by diffusers' own loader of the family, which is named like the transformer."""
    from diffusers.loaders import lora_pipeline

    kind = getattr(lora_pipeline, transformer.removesuffix("Transformer2DModel") + "LoraLoaderMixin", None)
    odd = next((key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key), "")
    if kind is None or odd:
        raise _unread(file, odd or next(iter(tensors)))
    try:  # the converters take out of the dictionary what they use
        found = kind.lora_state_dict(dict(tensors), return_alphas=True)
    except Exception as error:  # KeyError, ValueError, RuntimeError: whichever line of the converter it is
        raise UserError(f"tuning.start {file} cannot be converted ({error!r}): {LAYOUTS}") from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    for key in state:
        if not (key.startswith(PREFIX) and key.endswith(ENDS)):
            raise _unread(file, key)
    return Adapter(
        {key.removeprefix(PREFIX): value for key, value in state.items()},
        alphas={key.removeprefix(PREFIX).removesuffix(".alpha"): float(a) for key, a in (alphas or {}).items()},
    )


def _unread(file: Path, key: str) -> UserError:
    return UserError(f"tuning.start {file} holds {key}, which belongs to no supported layout of a LoRA: {LAYOUTS}")


def _check_layers(file: Path, adapter: Adapter, layers: dict[str, Any]) -> None:
    there = dict.fromkeys(key.removesuffix(ENDS[0]).removesuffix(ENDS[1]) for key in adapter.state)
    missing, extra = [name for name in layers if name not in there], [name for name in there if name not in layers]
    if missing or extra:
        raise UserError(
            f"tuning.start {file} has {len(there)} layers, the run's adapter {len(layers)}; "
            f"{_some('missing', missing)}, {_some('unexpected', extra)}. Set target_modules to the file's layers: "
            f"{', '.join(endings(list(there))[:12])}"
        )
    if half := [name + end for name in there for end in ENDS if name + end not in adapter.state]:
        raise UserError(f"tuning.start {file} has no {half[0]}; the file is incomplete, copy it again")


def _some(what: str, names: list[str]) -> str:
    return f"{what}: {len(names)}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")


def _check_rank(file: Path, name: str, rank: int, expected: int) -> None:
    if rank != expected:
        raise UserError(
            f"tuning.start {file}: the rank is {rank} at {name}, the run's is {expected}; use --tuning.rank {rank}, or "
            "an adapter of the run's rank (it must be the same for all layers)"
        )


def _check_shapes(file: Path, name: str, given: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> None:
    _check_rank(file, name, given[0].shape[0], own[0].shape[0])
    for value, p, end in zip(given, own, ENDS):
        if value.shape != p.shape:
            raise UserError(
                f"tuning.start {file}: {name}{end} is {tuple(value.shape)}, the run's adapter has {tuple(p.shape)}; it "
                "belongs to another architecture"
            )
        if not (value.is_floating_point() and bool(value.float().isfinite().all())):
            raise UserError(f"tuning.start {file}: {name}{end} has values that are not finite numbers; copy it again")


def _scale(file: Path, adapter: Adapter, name: str) -> float:
    try:
        scale = adapter.scale(name)
    except (TypeError, ValueError) as error:
        raise UserError(f"tuning.start {file}: the alpha of {name} is not a number ({error})") from error
    if not math.isfinite(scale):
        raise UserError(f"tuning.start {file}: the alpha of {name} is not finite")
    return scale

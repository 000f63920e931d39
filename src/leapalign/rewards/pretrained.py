"""Load weights (safetensors), preprocessing and tokenizer from a folder that transformers wrote, strictly.

transformers silently fills gaps with random weights, another resize or an empty vocabulary; here they raise UserError.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from leapalign.errors import UserError, opening
from leapalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, Rounding
from leapalign.rewards.sources import CLIP_TOKENIZER, FileSets
from leapalign.storage import files
from leapalign.storage.hub import find_file

if TYPE_CHECKING:
    from transformers import CLIPModel

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
BICUBIC = 3  # Pillow's number, which preprocessor_config.json stores as "resample"


def load_model(name: str, folder: str, device: str, dtype: str) -> tuple[CLIPModel, float]:
    """Load a frozen CLIPModel in eval mode and exp(logit_scale) unrounded. Raises UserError if a weight is missing."""
    from transformers import CLIPModel

    target = torch_dtype(name, dtype)
    model = read_model(name, folder, CLIPModel, "clip", torch.float32)
    scale = math.exp(float(model.logit_scale.detach()))  # in bfloat16 ln(100) would be off by 1 %
    return model.to(device, target), scale


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"{name}: dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def read_model(name: str, folder: str, model_class: type, model_type: str, dtype: torch.dtype) -> Any:
    """Load a transformers model of a folder or hub id, frozen, in eval mode. Raises UserError if it is incomplete."""
    kind = model_class.__name__
    check_architecture(name, folder, kind, model_type)
    with opening(f"{name}: {folder} has no weights that {kind} can read (model.safetensors)", "fetch or copy it again"):
        model, report = cast(Any, model_class).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{name}: {folder} lacks {len(missing)} weights of a {kind}, e.g. {missing[0]}; save it whole")
    return model.requires_grad_(False).eval()


def check_architecture(name: str, folder: str, kind: str, model_type: str) -> dict[str, Any]:
    """Read the folder's config.json. Raises UserError if it is missing or of another model type."""
    config = read_json(folder, "config.json")
    if not config:
        raise UserError(
            f"{name}: no config.json at {folder!r}; expected a local folder of a transformers {kind}, or a hub id "
            "that can be reached (HF_HUB_OFFLINE=1 forbids it). Give --path or fetch the model first"
        )
    if config.get("model_type") != model_type:
        raise UserError(f"{name}: {folder} is a {config.get('model_type')!r} model; expected {model_type!r} ({kind})")
    return config


def load_preprocess(name: str, folder: str, image_size: int, rounding: Rounding) -> Preprocess:
    """Read the folder's preprocessing; without a file, CLIP's mean and std at the model's image size."""
    config = read_json(folder, "preprocessor_config.json") or read_json(folder, "processor_config.json")
    config = config.get("image_processor", config)  # transformers 5 nests it
    crop, resize = square(config.get("crop_size", image_size)), shortest(config.get("size", image_size))
    standard = config.get("resample", BICUBIC) == BICUBIC and all(
        config.get(key, True) for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    )
    if not standard or not crop or not resize or crop > resize:
        raise UserError(
            f"{name}: the preprocessing in {folder} is not CLIP's (shortest edge by bicubic resize, centre crop, "
            f"normalise): {json.dumps(config)}; use the processor files of a CLIP model"
        )
    if crop != image_size:
        raise UserError(
            f"{name}: {folder} crops to {crop} pixels, but the model's image_size is {image_size}; use its own"
        )
    mean, std = tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
    return Preprocess(size=crop, resize=resize, rounding=rounding, mean=mean, std=std)


def square(size: int | dict[str, int]) -> int:
    """Return pixels from 224 or {"height": 224, "width": 224}; 0 for anything else."""
    if isinstance(size, int):
        return size
    return size.get("height", 0) if size.get("height") == size.get("width") else 0


def shortest(size: int | dict[str, int]) -> int:
    """Return pixels from 224 or {"shortest_edge": 224}; 0 for a resize that ignores the aspect ratio."""
    return size if isinstance(size, int) else size.get("shortest_edge", 0)


def load_tokenizer(name: str, folder: str, vocabulary: int, sets: FileSets = CLIP_TOKENIZER) -> Any:
    """Load the tokenizer, from one of the `sets` of files. Raises UserError if ids exceed the model's vocabulary."""
    from transformers import AutoTokenizer

    # checked first: transformers silently builds an empty tokenizer from config.json alone
    if not any(all(find(folder, file) for file in files) for files in sets):
        expected = ", or ".join(" with ".join(files) for files in sets)
        raise UserError(
            f"{name}: no tokenizer at {folder!r}; expected {expected}. Copy the files beside the weights, or name "
            f"their folder or hub id as `processor` (--reward {name}=PATH,processor=FOLDER); a hub id must be "
            "reachable (HF_HUB_OFFLINE=1 forbids it)"
        )
    with opening(
        f"{name}: transformers cannot read the tokenizer at {folder!r}",
        "expected what save_pretrained of a tokenizer writes",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocabulary:
        raise UserError(f"{name}: the tokenizer at {folder} has {len(tokenizer)} entries, the model knows {vocabulary}")
    return tokenizer


def read_json(folder: str, file: str) -> dict[str, Any]:
    """Return the file's content; empty if it does not exist."""
    found = find(folder, file)
    return files.read_json(Path(found)) if found else {}


def find(folder: str, file: str) -> str | None:
    """Return the local path of a file of a folder or hub id; None if it is missing or cannot be downloaded."""
    if Path(folder).is_dir():
        return str(Path(folder, file)) if Path(folder, file).is_file() else None
    return find_file(folder, file)

"""A reward of a run without its weights: bytes, the graph of a score, and what would be downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.errors import UserError
from leapalign.planning.downloads import Download, hub_file
from leapalign.planning.meta_models import META, fake
from leapalign.planning.reward_sizes import PUBLISHED, Architecture, clip
from leapalign.rewards.pretrained import read_json, resolve, torch_dtype
from leapalign.run import RewardTerm

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = {".safetensors", ".pt", ".pth", ".bin"}
FILES = {  # hub id -> file, about how many bytes
    "xswu/HPSv2": ("HPS_v2.1_compressed.pt", 1_972_000_000),
    "yuvalkirstain/PickScore_v1": ("model.safetensors", 3_944_000_000),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("tokenizer.json", 3_600_000),
    "MizzenAI/HPSv3": ("HPSv3.safetensors", 16_600_000_000),
    "Qwen/Qwen2-VL-7B-Instruct": ("tokenizer.json", 7_000_000),
    "THUDM/ImageReward": ("ImageReward.pt", 1_790_000_000),
    "google-bert/bert-base-uncased": ("tokenizer.json", 470_000),
    "openai/clip-vit-large-patch14": ("model.safetensors", 1_710_000_000),
}


@dataclass(frozen=True, kw_only=True)
class RewardPlan:
    """`score` is None where the graph of a score is not known, and then `note` says so."""

    name: str
    bytes: int
    network: Any  # its nn.Module, without weights; None where it is not known
    score: Callable[[Tensor], Tensor] | None
    note: str
    downloads: tuple[Download, ...]


def plan_reward(term: RewardTerm, dtype: str, mode: FakeTensorMode) -> RewardPlan:
    """Of the term's reward in its dtype. UserError where its path is neither a file or folder here nor a hub id."""
    reward: Any = term.reward
    name = getattr(reward, "name", type(reward).__name__)
    paths = [p for p in (getattr(reward, "path", ""), getattr(reward, "processor", "")) if p]
    downloads = tuple(d for path in paths if (d := _download(name, path)))
    architecture, note = _architecture(name, paths[0] if paths else "")
    if architecture is None:
        return RewardPlan(name=name, bytes=_file_bytes(paths), network=None, score=None, note=note, downloads=downloads)
    with torch.device(META):
        loaded = architecture.make()
    target = torch_dtype(name, term.dtype or dtype)
    loaded.model.to(target).requires_grad_(False).eval()
    for head in ("rm_head", "mlp"):  # of HPSv3 and ImageReward: float32 at least
        if hasattr(loaded.model, head):
            getattr(loaded.model, head).to(torch.promote_types(target, torch.float32))
    fake(loaded.model, mode)
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    return RewardPlan(
        name=name,
        bytes=size,
        network=loaded.model,
        score=lambda images: architecture.score(loaded, images),
        note=note,
        downloads=downloads,
    )


def _architecture(name: str, path: str) -> tuple[Architecture | None, str]:
    here = Path(resolve(path)) if path else None
    if here is None or not here.exists():
        return PUBLISHED.get(name), "" if name in PUBLISHED else "its memory is not known: not counted"
    if name in ("pickscore", "clipscore"):
        return _clip_in(name, str(here)), ""
    return None, "of the files here; the graph of a score is not counted"


def _clip_in(name: str, folder: str) -> Architecture:
    from transformers import CLIPConfig

    config = read_json(folder, "config.json")
    if config.get("model_type") != "clip":
        raise UserError(f"{name}: {folder} has no config.json of a CLIPModel; give a folder that save_pretrained wrote")
    return clip(name, lambda: CLIPConfig(**config))


def _file_bytes(paths: list[str]) -> int:
    places = [Path(resolve(path)) for path in paths[:1]]
    files = [f for place in places for f in (place.iterdir() if place.is_dir() else [place]) if f.suffix in WEIGHTS]
    return sum(file.stat().st_size for file in files if file.is_file())


def _download(name: str, path: str) -> Download | None:
    if Path(resolve(path)).exists():
        return None
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"{name}: there is no file or folder {path!r}; give one, or a hub id")
    file, size = FILES.get(path, ("", 0))
    return hub_file(path, file, size)

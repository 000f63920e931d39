"""Plan a reward without its weights: its bytes, the graph of a score, and its downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.errors import UserError
from leapalign.monitors import HeldOut
from leapalign.planning.downloads import Download, hub_file
from leapalign.planning.meta_models import META, fake
from leapalign.rewards.adapt import described
from leapalign.rewards.base import DescribedReward, Source
from leapalign.rewards.pretrained import torch_dtype
from leapalign.rewards.sources import is_here
from leapalign.run import RewardTerm
from leapalign.storage.embedded import resolve
from leapalign.storage.files import PICKLES
from leapalign.storage.hub import is_hub_id

WEIGHTS = {".safetensors", *PICKLES}


@dataclass(frozen=True, kw_only=True)
class RewardPlan:
    """A reward's plan; `score` is None if the graph of a score is unknown, and `note` says so."""

    name: str
    bytes: int
    network: nn.Module | None  # meta-device model; None if unknown
    score: Callable[[Tensor], Tensor] | None
    note: str
    downloads: tuple[Download, ...]


def plan_reward(term: RewardTerm | HeldOut, dtype: str, mode: FakeTensorMode) -> RewardPlan:
    """Plan the term's reward in its dtype. Raises UserError if a path is neither local nor a hub id."""
    config = described(term.reward)
    downloads = tuple(d for source in config.sources() if (d := _download(config.name, source)))
    known = config.weightless()
    if known is None:
        size, note = _unknown(config)
        return RewardPlan(name=config.name, bytes=size, network=None, score=None, note=note, downloads=downloads)
    with torch.device(META):
        loaded = known.make()
    network: nn.Module = loaded.model
    target = torch_dtype(config.name, term.dtype or dtype)
    network.to(target).requires_grad_(False).eval()
    for head in known.heads:
        network.get_submodule(head).to(torch.promote_types(target, torch.float32))
    fake(network, mode)
    return RewardPlan(
        name=config.name,
        bytes=sum(p.numel() * p.element_size() for p in network.parameters()),
        network=network,
        score=lambda images: known.score(loaded, images),
        note="",
        downloads=downloads,
    )


def _unknown(config: DescribedReward) -> tuple[int, str]:
    """Return (bytes, note) of a reward whose architecture is unknown: the size of its local files, or 0."""
    here = [source for source in config.sources() if source.weights and is_here(source.path)]
    if not here:
        return 0, "its memory is not known: not counted"
    return _file_bytes(here), "of the files here; the graph of a score is not counted"


def _file_bytes(sources: Sequence[Source]) -> int:
    places = {Path(resolve(source.path)) for source in sources}
    files = {f for place in places for f in (place.iterdir() if place.is_dir() else [place]) if f.suffix in WEIGHTS}
    return sum(file.stat().st_size for file in files if file.is_file())


def _download(name: str, source: Source) -> Download | None:
    if is_here(source.path):
        return None
    if not is_hub_id(source.path):
        raise UserError(
            f"{name}: {source.field} is {source.path!r}, and no file or folder is there; give one, or a hub id"
        )
    return hub_file(source.path, source.file, source.bytes)

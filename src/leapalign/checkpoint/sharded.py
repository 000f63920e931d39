"""Sharded checkpoints: every rank writes its own shards as safetensors, through torch's distributed checkpoint (DCP).

    step-000050/  shard-00001-model-00001-of-00003.safetensors  ...  run.json  state.json

`shard` is the rank + 1, `model` the group (weights, ema, optimizer); a file records its shards' offsets in the whole
tensors. Readers take what they need from all files, so any number of ranks can resume.

Only the parts of DCP without collectives are used. A rank's plan follows from its own tensors, and ranks communicate
through the folder: each writes its files and then a note with their sha256; rank 0 waits for all notes, adds state.json
and renames the folder. Threads can therefore save during training without meeting its collectives, and a rank that
dies leaves a folder that is not taken for a checkpoint. Replicas of hybrid sharding are written once.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from leapalign.distributed.tensors import Named
from leapalign.distributed.world import World
from leapalign.errors import RunStopped, UserError
from leapalign.storage.atomic import write_text
from leapalign.storage.files import sha256

if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

PATIENCE = 600.0  # seconds without a new byte from any rank before rank 0 abandons a checkpoint
PATIENCE_AT_END = 25.0  # the same after an error of the run: a rank may be dead
POLL = 0.02  # seconds
FILE = "shard-{shard:05d}-model-{group:05d}-of-{groups:05d}.safetensors"  # named by DCP


@dataclass(frozen=True, kw_only=True)
class Writers:
    """The ranks that write a run's checkpoints together, and this process's place among them."""

    rank: int
    ranks: tuple[int, ...]
    token: str  # new at each start of the run: an earlier process may still be writing to its own folder
    ending: threading.Event = field(default_factory=threading.Event)  # set when the run ends with an error


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards of one checkpoint that one rank writes."""

    writers: Writers
    plan: SavePlan  # its shards: tensor name, offsets, sizes


class _Planner(DefaultSavePlanner):
    """DCP's planner, reading shards from copies, because the run's own tensors have changed since."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def lookup_object(self, index: Any) -> Tensor:
        return self.tensors[index.fqn]


def writers_of(parameters: Named, world: World) -> Writers | None:
    """Find the ranks that hold the first copy of the sharded weights; None if every rank has whole weights.

    Every rank must call it.
    """
    mesh = next((p.device_mesh.mesh for p in parameters.values() if isinstance(p, DTensor)), None)
    if mesh is None:
        return None
    first = mesh[0] if mesh.ndim == 2 else mesh  # hybrid: [replicas, shards]
    return Writers(rank=world.rank, ranks=tuple(first.tolist()), token=world.from_main(secrets.token_hex(4)))


def part_of(groups: Mapping[str, Named], writers: Writers) -> Part:
    """Plan this rank's shards. The first rank writes tensors that are whole on every rank."""
    first = writers.rank == writers.ranks[0]
    mine = {name: t for name, t in _named(groups) if first or isinstance(t, DTensor)}
    planner = _Planner({})
    planner.set_up_planner(mine, is_coordinator=first)
    return Part(writers=writers, plan=planner.create_local_plan())


def write(folder: Path, groups: Mapping[str, Named], part: Part) -> None:
    """Write this rank's files, fsynced, and then a note with their hashes, or with the error, into the folder."""
    rank = part.writers.rank
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_files(folder, groups, part.plan, rank)
        files = {path.name: sha256(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")}
    except Exception as error:
        if not folder.exists():
            raise RunStopped("rank 0 has given up the checkpoint; its own message says why") from error
        write_text(_note(folder, rank), json.dumps({"error": str(error)}))
        raise
    write_text(_note(folder, rank), json.dumps({"files": files}))


def collect(folder: Path, writers: Writers) -> dict[str, str]:
    """Wait until every rank has written; return file -> sha256. Raises RunStopped if a rank fails or stalls."""
    files: dict[str, str] = {}
    waiting, seen, since = list(writers.ranks), -1, time.monotonic()
    while waiting:
        for rank in [rank for rank in waiting if _note(folder, rank).exists()]:
            said = json.loads(_note(folder, rank).read_text())
            if "error" in said:
                raise RunStopped(f"rank {rank} could not write its part of the checkpoint: {said['error']}")
            files |= said["files"]
            _note(folder, rank).unlink()
            waiting.remove(rank)
        size = sum(path.stat().st_size for path in folder.glob("shard-*"))
        if size != seen:
            seen, since = size, time.monotonic()
        patience = PATIENCE_AT_END if writers.ending.is_set() else PATIENCE
        if waiting and time.monotonic() - since > patience:
            raise RunStopped(f"rank {waiting[0]} has written nothing of its part of the checkpoint for {patience:g} s")
        time.sleep(POLL)
    return files


def file_names(ranks: Iterable[int], groups: int) -> set[str]:
    """Return the file names of a checkpoint that these ranks wrote."""
    numbers = range(1, groups + 1)
    return {FILE.format(shard=rank + 1, group=group, groups=groups) for rank in ranks for group in numbers}


def listed(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return group -> name -> saved tensor, on the meta device."""
    groups: dict[str, dict[str, Tensor]] = {}
    infos: dict[str, Any] = _reader(folder).read_metadata().state_dict_metadata
    for full_name, info in infos.items():
        group, _, name = full_name.partition("/")
        groups.setdefault(group, {})[name] = torch.empty(info.size, dtype=info.properties.dtype, device="meta")
    return groups


@torch.no_grad()
def read(folder: Path, groups: Mapping[str, Named]) -> None:
    """Load these tensors; of a sharded tensor only this rank's shard is read."""
    state: dict[str, Any] = dict(_named(groups))
    reader, planner = _reader(folder), DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def _write_files(folder: Path, groups: Mapping[str, Named], plan: SavePlan, rank: int) -> None:
    tensors = dict(_named(groups))
    numbers = {group: number for number, group in enumerate(groups, 1)}
    writer = _writer(folder, {item.index.fqn: numbers[item.index.fqn.partition("/")[0]] for item in plan.items})
    writer.set_up_storage_writer(is_coordinator=False)
    plan = writer.prepare_local_plan(plan)
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]  # a file's number is its index in this list
    writer.write_data(plan, _Planner(tensors)).wait()


def _named(groups: Mapping[str, Named]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{group}/{name}", t.detach()) for group, named in groups.items() for name, t in named.items())


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _writer(folder: Path, numbers: dict[str, int]) -> HuggingFaceStorageWriter:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    return HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)


def _reader(folder: Path) -> HuggingFaceStorageReader:
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    except ImportError:
        raise UserError(f"{folder}: a sharded checkpoint needs a newer torch than {torch.__version__}") from None
    return HuggingFaceStorageReader(str(folder))

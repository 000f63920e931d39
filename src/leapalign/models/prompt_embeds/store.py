"""Prompt embeds on disk, one safetensors file per prompt, so that a second run never loads the text encoders.

An entry's key covers all inputs of its numbers: the content of the text encoders' and tokenizers' files (so a hub
snapshot, its copy and a tuned pipeline of it share entries), the settings, the kind of device, the library versions,
and the prompt. Entries are written to a scratch file and renamed, so several processes may write and read at once.
Each holds the sha256 of its tensors; an entry that does not match is reported and encoded again.

    PLACE/KEY/key.json             which model and settings KEY stands for
    PLACE/KEY/SHA256.safetensors   the prompt with that sha256
    PLACE/hashes/                  sha256 of local files, by path, size and time, so that they are read once
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.errors import UserError
from leapalign.models.prompt_embeds.location import SCRATCH, CachePlan, free_bytes, limit, place, prune
from leapalign.storage.hub import blob_hash
from leapalign.storage.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

    from leapalign.models.base import Text
    from leapalign.storage.pipeline_folder import PipelineFolder

FORMAT = 1  # version of entries and keys; a new number ignores all older entries
HEADER = 512  # approximate bytes of a file besides its tensors
WORTHWHILE = 64 * 2**20  # bytes of text encoders; smaller ones run as fast as files are read


@dataclass(eq=False, kw_only=True)
class PromptStore:
    """The entries of one model with one set of settings."""

    root: Path
    limit: int
    folder: PipelineFolder
    components: tuple[str, ...]  # text encoders and tokenizers
    settings: Mapping[str, Any]  # other inputs that change the numbers
    needed: set[Path] = field(default_factory=set)  # entries that this process needs and does not prune

    @staticmethod
    def of(folder: PipelineFolder, components: tuple[str, ...], settings: Mapping[str, Any]) -> PromptStore | None:
        """Return the folder's store; None if its text encoders are small or the user turned the store off."""
        most = limit()
        weights = (file for component in components for file in (folder.path / component).glob("*.safetensors"))
        if not most or sum(file.stat().st_size for file in weights) < WORTHWHILE:
            return None
        return PromptStore(root=place(), limit=most, folder=folder, components=components, settings=settings)

    @cached_property
    def key(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "classes": {
                component: self.folder.components[component][1]
                for component in self.components
                if component in self.folder.components
            },
            "files": fingerprint(self.folder.path, self.components, self.root),
            "settings": dict(self.settings),
            "versions": _versions(),
        }

    @cached_property
    def home(self) -> Path:
        text = json.dumps(self.key, sort_keys=True)
        home = self.root / hashlib.sha256(text.encode()).hexdigest()[:32]
        with _writing(self.root):
            home.mkdir(parents=True, exist_ok=True)
            described = {"model": str(self.folder.path), **self.key}
            _replace(home / "key.json", json.dumps(described, indent=2).encode())
        return home

    def file(self, prompt: str) -> Path:
        return self.home / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def has(self, prompt: str) -> bool:
        """Return True for a complete file, by header and length, and mark it as used. `read` checks its hash."""
        file = self.file(prompt)
        self.needed.add(file)
        try:
            read_header(file)
            os.utime(file)
        except FileNotFoundError:
            return False
        except ValueError as error:
            return _report(file, str(error))
        return True

    def read(self, prompt: str) -> Text | None:
        """Return an entry; None if it is missing, or damaged, which is reported and removed."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from leapalign.models.base import Text

        file = self.file(prompt)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            noted = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            tensors = load(data)
            wrong = "its sha256 is not the recorded one" if noted["sha256"] != _digest(tensors) else ""
            wrong = wrong or ("it holds another prompt" if noted["prompt"] != prompt else "")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            tensors, wrong = {}, f"it cannot be read ({error})"
        if wrong:
            _report(file, wrong)
            return None
        return Text(**tensors)

    def write(self, prompt: str, row: Text) -> None:
        from safetensors.torch import save

        named = {"tokens": row.tokens, "pooled": row.pooled, "mask": row.mask}
        tensors = {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}
        with _writing(self.root):
            _replace(self.file(prompt), save(tensors, {"sha256": _digest(tensors), "prompt": prompt}))

    def mark(self) -> Path:
        """Create an empty file with a unique name, by which other processes detect that they share the store."""
        with _writing(self.root):
            handle, name = tempfile.mkstemp(dir=self.home, prefix=SCRATCH)
            os.close(handle)
        return Path(name)

    def make_room(self, count: int, bytes_each: int) -> None:
        """Prune other runs' least recently used entries to fit `count` more. Raises UserError if they cannot fit."""
        present = sum(file.stat().st_size for file in self.needed if file.is_file())
        more = count * (bytes_each + HEADER)
        plan = CachePlan(place=self.root, limit=self.limit, free=free_bytes(self.root) + present, needed=present + more)
        if plan.problem:
            raise UserError(plan.problem)
        prune(self.root, self.limit - more, keep=self.needed)


def fingerprint(folder: Path, components: Iterable[str], root: Path) -> str:
    """Hash (sha256) the names and contents of the components' files. Hashes of local files are cached in `root`."""
    digest = hashlib.sha256()
    for component in components:
        for file in sorted((folder / component).rglob("*")):
            if file.suffix in {".safetensors", ".json", ".txt", ".model", ".jinja"} and file.is_file():
                digest.update(f"{component}/{file.relative_to(folder / component)} {file_hash(file, root)}\n".encode())
    return digest.hexdigest()


def file_hash(file: Path, root: Path) -> str:
    """Return a file's sha256: its blob name in the hub's cache, or the hash cached since its last change."""
    known = blob_hash(file)
    if len(known) == 64:
        return known
    real = file.resolve()
    stat = real.stat()
    state = f"{real} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    noted = root / "hashes" / hashlib.sha256(state.encode()).hexdigest()
    if noted.is_file() and len(value := noted.read_text(encoding="ascii")) == 64:
        return value
    from leapalign.storage.files import sha256

    value = sha256(real)
    with _writing(root):
        noted.parent.mkdir(parents=True, exist_ok=True)
        _replace(noted, value.encode())
    return value


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _report(file: Path, what: str) -> bool:
    """Warn of a damaged entry and remove it, so that it is encoded again. Returns False."""
    warnings.warn(f"prompt cache: {file}: {what}; it is removed, and the prompt is encoded again", stacklevel=4)
    file.unlink(missing_ok=True)
    return False


def _replace(target: Path, data: bytes) -> None:
    """Write a file atomically: complete or absent, even with several writers."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=SCRATCH)
    try:
        with os.fdopen(handle, "wb") as scratch:
            scratch.write(data)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Context for writes to the cache directory: raises UserError for a read-only or full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the prompt cache at {root} cannot be written ({error.strerror or error}); set LEAPALIGN_CACHE to "
            "another folder, or LEAPALIGN_CACHE_GB=0 to keep prompts in memory"
        ) from error

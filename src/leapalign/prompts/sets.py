"""Published prompt sets: downloaded by the hub's client on first use, never shipped (licences: docs/prompts.md).

Only the small file with the texts is downloaded, never images. `path` names a copy of that file on disk instead.

Subsets (a training sample, a test split) are chosen by the sha256 of seed and text, independent of the file's order and
of any random generator's version. Duplicate texts count once; blank ones are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.prompts.base import HubFile, Prompt, check_text
from leapalign.storage.hub import snapshot


@dataclass(frozen=True, kw_only=True)
class HPDv2:
    """Human Preference Dataset v2 (arXiv 2306.09341): training prompts, or the 400 of its test set."""

    name: ClassVar[str] = "hpdv2"
    licence: ClassVar[str] = "Apache-2.0 by its card (unverified)"

    split: Literal["train", "test"] = "train"
    num: int = 0  # number of prompts, chosen by `seed`; 0 = all
    seed: int = 0
    path: str = ""  # train.json or test.json on disk; empty = from the hub

    @property
    def source(self) -> HubFile:
        return HubFile("ymhao/HPDv2", f"{self.split}.json", 116_000_000 if self.split == "train" else 436_000)

    def load(self) -> list[Prompt]:
        return choose(texts_in(_file(self.path, self.source)), self.num, self.seed)


@dataclass(frozen=True, kw_only=True)
class MJHQ30k:
    """MJHQ-30K (arXiv 2402.17245): 500 prompts chosen by `split_seed` are the test split, all others training."""

    name: ClassVar[str] = "mjhq-30k"
    licence: ClassVar[str] = "none found: a research set of Playground; see its card"

    split: Literal["train", "test"] = "train"
    test_size: int = 500  # prompts held out; the paper's own 500 are not published
    split_seed: int = 0  # selects them
    path: str = ""  # meta_data.json on disk; empty = from the hub

    @property
    def source(self) -> HubFile:
        return HubFile("playgroundai/MJHQ-30K", "meta_data.json", 8_800_000)

    def load(self) -> list[Prompt]:
        texts = texts_in(_file(self.path, self.source))
        if not 0 < self.test_size < len(texts):
            raise UserError(f"mjhq-30k: test_size {self.test_size} of {len(texts)} prompts; leave some for both splits")
        test = choose(texts, self.test_size, self.split_seed)
        held_out = {prompt.text for prompt in test}
        return test if self.split == "test" else [Prompt(text=text) for text in texts if text not in held_out]


@dataclass(frozen=True, kw_only=True)
class DrawBench:
    """DrawBench (arXiv 2205.11487): 200 hard prompts, for evaluation."""

    name: ClassVar[str] = "drawbench"
    licence: ClassVar[str] = "Apache-2.0 by one copy's card (unverified)"

    path: str = ""  # drawbench.json on disk; empty = from the hub

    @property
    def source(self) -> HubFile:
        return HubFile("zhwang/HPDv2", "benchmark/drawbench.json", 20_000)

    def load(self) -> list[Prompt]:
        return choose(texts_in(_file(self.path, self.source)), 0, 0)


def choose(texts: Iterable[str], num: int, seed: int) -> list[Prompt]:
    """Choose `num` of the texts, in their own order; 0 = all."""
    texts = list(texts)
    if num < 0 or num > len(texts):
        raise UserError(f"num {num}: this set has {len(texts)} different prompts; use 0 for all of them")
    chosen = set(sorted(texts, key=lambda text: _rank(text, seed))[:num]) if num else set(texts)
    return [Prompt(text=text) for text in texts if text in chosen]


def _rank(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode()).digest()


def texts_in(file: Path) -> list[str]:
    """Read unique texts from a .json file: a list of texts or of objects with "prompt", or an object of these."""
    from leapalign.prompts.files import read_records

    content = read_records(file)
    records = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(records, list) or not records:
        raise UserError(f"{file}: expected a list of prompts, or an object of them; fetch the file again")
    texts = (_text(file, place, record) for place, record in enumerate(records))
    return list(dict.fromkeys(text for text in texts if text))


def _text(file: Path, place: int, record: Any) -> str:
    text = record.get("prompt") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise UserError(f'{file}, entry {place}: expected a text, or an object with a text "prompt"')
    return check_text(text, f"{file}, entry {place}")


def _file(path: str, source: HubFile) -> Path:
    """Return the file on disk, or the copy in the hub's cache. Raises UserError if it is missing."""
    if path:
        return Path(path)
    remedy = (
        f"fetch it where there is a network (`hf download --repo-type dataset {source.repo} {source.file}`), or name a "
        "copy on disk with --prompts.path (train) or --prompts NAME=PATH (evaluate)"
    )
    try:
        found = snapshot(source.repo, [source.file], repo_type="dataset") / source.file
    except UserError as error:
        raise UserError(f"the prompts {source.file} of {error}; {remedy}") from error
    if not found.is_file():  # offline, the cached snapshot may lack this file
        raise UserError(f"the prompts {source.file} of {source.repo} are not in the hub's cache; {remedy}")
    return found

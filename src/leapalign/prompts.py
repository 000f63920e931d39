"""Prompts: what the images should show, from files or from ShapeWorld, with GenEval's metadata where there is some.

A source is a frozen dataclass with `load() -> list[Prompt]`; training/batches.py orders them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Protocol

from leapalign.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One text, and its GenEval metadata ({"tag", "include", "exclude"?, "prompt"}) if it has any."""

    text: str
    metadata: dict[str, Any] | None = None


class Prompts(Protocol):
    """Where prompts come from."""

    def load(self) -> list[Prompt]:
        """All prompts, always in the same order."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A .txt (a prompt a line), .jsonl (objects with "prompt") or .csv file (a column "prompt"), in UTF-8."""

    path: str  # the file

    def load(self) -> list[Prompt]:
        readers: dict[str, Callable[[str, Path], Iterator[Prompt]]] = {
            ".txt": _read_txt,
            ".jsonl": _read_jsonl,
            ".csv": _read_csv,
        }
        path = Path(self.path)
        if path.suffix not in readers:
            raise UserError(f"{path}: a prompt file ends in {', '.join(readers)}, not in {path.suffix or 'nothing'!r}")
        prompts = list(readers[path.suffix](_read_text(path), path))
        if not prompts:
            raise UserError(f"{path}: there is no prompt in this file")
        return prompts


@dataclass(frozen=True, kw_only=True)
class ShapeWorldPrompts:
    """Generated prompts of the embedded world: its six tasks in GenEval's ratio, with metadata."""

    split: Literal["train", "test"] = "train"  # test combinations never appear among the training prompts
    num: int = 4096  # prompts in all (train), prompts a task (test)
    seed: int = 0  # which training prompts; not the run's seed

    def load(self) -> list[Prompt]:
        from leapalign.shapeworld import captions

        test = self.split == "test"
        records = captions.evaluation_prompts(self.num) if test else captions.train_prompts(self.num, self.seed)
        return [Prompt(text=record["prompt"], metadata=record) for record in records]


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompt file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the prompt file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: there is a NUL byte in it; is this a text file?")
    return text


def _read_txt(text: str, path: Path) -> Iterator[Prompt]:
    for line in text.split("\n"):
        if line.strip():
            yield Prompt(text=line.strip())


def _read_jsonl(text: str, path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            raise UserError(f'{path}, line {number}: expected an object with a non-empty string "prompt"')
        yield Prompt(text=record["prompt"].strip(), metadata=record if len(record) > 1 else None)


def _read_csv(text: str, path: Path) -> Iterator[Prompt]:
    rows = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        if "prompt" not in (rows.fieldnames or []):
            raise UserError(f"{path}: the first line names the columns {rows.fieldnames}; one must be 'prompt'")
        for row in rows:
            if not (row["prompt"] or "").strip():
                raise UserError(f"{path}, line {rows.line_num}: the column 'prompt' is empty")
            yield Prompt(text=row["prompt"].strip())
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error})") from None

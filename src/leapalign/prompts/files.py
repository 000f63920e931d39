"""Prompt files, read strictly: .txt, .jsonl and .csv of the user's own, and the JSON files of published sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from leapalign.errors import UserError
from leapalign.prompts.base import Prompt, check_text


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file, whose ending says what it is; UserError names the line that is wrong."""
    readers: dict[str, Callable[[str, Path], Iterator[Prompt]]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
    }
    path = Path(file)
    if path.suffix not in readers:
        raise UserError(f"{path}: a prompt file ends in {', '.join(readers)}, not in {path.suffix or 'nothing'!r}")
    prompts = list(readers[path.suffix](_read_text(path), path))
    if not prompts:
        raise UserError(f"{path}: there is no prompt in this file")
    return prompts


def read_records(path: Path) -> Any:
    """The content of a .json file."""
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None


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
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Prompt(text=check_text(line, f"{path}, line {number}"))


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
        text = check_text(record["prompt"], f"{path}, line {number}")
        yield Prompt(text=text, metadata=record if len(record) > 1 else None)


def _read_csv(text: str, path: Path) -> Iterator[Prompt]:
    rows = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        if "prompt" not in (rows.fieldnames or []):
            raise UserError(f"{path}: the first line names the columns {rows.fieldnames}; one must be 'prompt'")
        for row in rows:
            if not (row["prompt"] or "").strip():
                raise UserError(f"{path}, line {rows.line_num}: the column 'prompt' is empty")
            yield Prompt(text=check_text(row["prompt"], f"{path}, line {rows.line_num}"))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error})") from None

"""Prompt files, read strictly: .txt, .jsonl and .csv files of the user, and the JSON files of published sets.

Accepted: UTF-8, or UTF-16 and UTF-32 with a byte-order mark; line ends \\n, \\r\\n or \\r, also mixed; and byte-order
marks at the start of lines, as left by concatenating files. Anything else raises UserError with file and line.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from leapalign.errors import UserError
from leapalign.prompts.base import Prompt, check_text

MARK = "\ufeff"  # the byte-order mark
ENCODINGS = (  # byte-order mark -> encoding; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_prompts(file: str) -> list[Prompt]:
    """Read the prompts of a .txt, .jsonl or .csv file. Raises UserError with the invalid line."""
    readers: dict[str, Callable[[str, Path], Iterator[Prompt]]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
    }
    path = Path(file)
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in {', '.join(readers)}, not in {path.suffix or 'nothing'!r}")
    prompts = list(readers[path.suffix.lower()](_read_text(path), path))
    if not prompts:
        raise UserError(f"{path}: the file has no prompts")
    return prompts


def read_records(path: Path) -> Any:
    """Read the content of a .json file. Raises UserError if it is invalid."""
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None


def _read_text(path: Path) -> str:
    """Read text, with \\n as line end and without byte-order marks. Raises UserError with the invalid line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompt file ({error.strerror})") from None
    text = f"\n{_one_ending(_decode(content, path))}".replace(f"\n{MARK}", "\n")[1:]
    if "\0" in text:
        raise UserError(
            f"{path}, line {_line(text, chr(0))}: contains a NUL character; is this a text file? "
            "UTF-16 needs a byte-order mark"
        )
    if MARK in text:
        raise UserError(
            f"{path}, line {_line(text, MARK)}: a byte-order mark inside the line; files were joined without a line "
            "end between them: begin a new line there"
        )
    return text


def _decode(content: bytes, path: Path) -> str:
    encoding = next((name for mark, name in ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + _one_ending(content[: error.start].decode(encoding, errors="replace")).count("\n")
        raise UserError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is not {encoding.upper()}; save the prompt "
            f"file as UTF-8, for instance with `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`"
        ) from None


def _one_ending(text: str) -> str:
    """Convert all line ends to \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(text: str, character: str) -> int:
    """Return the number of the first line with the character."""
    return 1 + text[: text.index(character)].count("\n")


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
            if None in row:
                raise UserError(
                    f"{path}, line {rows.line_num}: more values than the {len(rows.fieldnames or [])} columns; put a "
                    "prompt with commas in double quotes"
                )
            if not (row["prompt"] or "").strip():
                raise UserError(f"{path}, line {rows.line_num}: the column 'prompt' is empty")
            yield Prompt(text=check_text(row["prompt"], f"{path}, line {rows.line_num}"))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error})") from None

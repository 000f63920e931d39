"""Prompt files of three kinds, and everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest

from leapalign.errors import UserError
from leapalign.prompts import Prompt, PromptFile, ShapeWorldPrompts


def load(tmp_path, name: str, content: bytes | str) -> list[Prompt]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptFile(path=str(path)).load()


def test_the_three_formats(tmp_path):
    assert load(tmp_path, "a.txt", "one \n\n\r\ntwo\u2028x\r\n") == [Prompt("one"), Prompt("two\u2028x")]
    record = {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}
    lines = (
        '\ufeff{"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}\n{"prompt": "x"}\n'
    )
    assert load(tmp_path, "a.jsonl", lines) == [Prompt("two cats", record), Prompt("x")]
    assert load(tmp_path, "a.csv", 'id,prompt\n1,"a, b"\n2,"c\nd"\n') == [Prompt("a, b"), Prompt("c\nd")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_ending_and_any_marked_encoding(tmp_path, encoding, end):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    lines = ["a café 😀", "", "two stars", "a ring"]
    plain = [Prompt(line) for line in lines if line]
    as_json = [json.dumps({"prompt": line}) for line in lines if line]
    as_csv = ["prompt", *(line for line in lines if line)]
    for name, each in (("a.txt", lines), ("a.jsonl", as_json), ("a.csv", as_csv), ("B.TXT", lines)):
        assert load(tmp_path, name, (mark + end.join(each)).encode(encoding)) == plain


def test_joined_files_keep_their_marks_at_the_start_of_lines(tmp_path):
    three = [Prompt(word) for word in ("one", "two", "three")]
    assert load(tmp_path, "a.txt", "\ufeffone\r\n\ufefftwo\r\ufeffthree\n") == three
    whole = '{"prompt": "\\ud83d\\ude00 cat"}'  # two halves that make one character
    assert load(tmp_path, "a.jsonl", f"\ufeff{whole}\n\ufeff{whole}") == [Prompt("😀 cat")] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", "x", "ends in .txt, .jsonl, .csv, not in '.md'"),
        ("a.txt", " \n\n", "the file has no prompts"),
        ("a.txt", b"a\r\ncaf\xe9", r"a\.txt, line 2: the byte 0xe9 is not UTF-8; .*iconv -f WINDOWS-1252"),
        ("a.txt", "x\na\0b", r"a\.txt, line 2: contains a NUL character"),
        ("a.txt", "a\nb".encode("utf-16-le"), "line 1: contains a NUL character; .* UTF-16 needs a byte-order mark"),
        ("a.txt", b"\xff\xfea\0\n\0\x00\xd8", "line 2: the byte 0x00 is not UTF-16-LE"),
        ("a.txt", "a red circle\na star\ufeffa ring\n", "line 2: a byte-order mark inside the line; files were joined"),
        ("a.txt", "x" * 10_001, "line 1: a prompt of 10001 characters"),
        ("a.jsonl", '{"prompt": "x"}\r{"prompt": "a \\ud83d cat"}', r"line 2: \\ud83d is one half of a character"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', "line 1: contains a NUL character"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}', 'line 1: expected an object with a non-empty string "prompt"'),
        ("a.jsonl", '{"prompt": 3}', "line 1: expected an object"),
        ("a.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.csv", "text\nx\n", "one must be 'prompt'"),
        ("a.csv", "", "one must be 'prompt'"),
        ("a.csv", "id,prompt\n1\n", "line 2: the column 'prompt' is empty"),
        (
            "a.csv",
            "prompt\na cat\na dog, brown\n",
            "line 3: more values than the 1 columns; put a prompt",
        ),
        ("a.csv", 'prompt\n"x', "not CSV"),
        ("a.csv", "prompt\n" + "x" * 200_000, "not CSV"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, name, content)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="cannot read the prompt file"):
        PromptFile(path=str(tmp_path / "none.txt")).load()
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot read the prompt file"):
        PromptFile(path=str(tmp_path / "folder.txt")).load()


def test_shapeworld_prompts_carry_metadata():
    train, test = ShapeWorldPrompts(num=50).load(), ShapeWorldPrompts(split="test", num=3).load()
    assert len(train) == 50 and len(test) == 18
    assert all(p.metadata and p.metadata["prompt"] == p.text for p in train + test)
    assert ShapeWorldPrompts(num=50, seed=1).load() != train

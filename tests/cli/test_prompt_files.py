"""Prompt files of three kinds, and everything that can be wrong with them."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", "x", "ends in .txt, .jsonl, .csv, not in '.md'"),
        ("a.txt", " \n\n", "there is no prompt"),
        ("a.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("a.txt", "a\0b", "NUL"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}', 'line 1: expected an object with a non-empty string "prompt"'),
        ("a.jsonl", '{"prompt": 3}', "line 1: expected an object"),
        ("a.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.csv", "text\nx\n", "one must be 'prompt'"),
        ("a.csv", "", "one must be 'prompt'"),
        ("a.csv", "id,prompt\n1\n", "line 2: the column 'prompt' is empty"),
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

"""Bytes, JSON, safetensors and files, spoilt in one place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from fuzz.sandbox import Change, Files

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e-320, float("nan"), float("inf"), 2**63, -(2**63) - 1),
    *(10**30, "", "x", "\0", "é\u202e", "../../outside", "/etc/passwd", "1", "auto", "meta", [], [[]], [None], {}),
    *({"type": "x"}, {"type": "leapalign.methods.refl.ReFL"}, "os.system", "leapalign.models.sd3.SD3", "x" * 3000),
    *([1, 2, 3, 4, 5], {"a": {"b": {}}}, {"__class__": "x"}, ["os", "system"], "A" * 70000, "leapalign.cli.main"),
)


def damage(rng: Random, files: Files, *folders: str) -> tuple[Change, ...]:
    """One or two files below the folders: other bytes, other JSON, gone, a folder, or a link out of the folder."""
    names = [name for name in files if any(name == f or name.startswith(f"{f}/") for f in folders)]
    changes = {name: _damaged(rng, name, files[name]) for name in rng.choices(names, k=rng.choice([1, 1, 1, 2]))}
    return tuple(changes.values())


def _damaged(rng: Random, name: str, content: bytes) -> Change:
    instead = rng.choice([*["bytes"] * 12, "gone", "folder", "link"])
    if instead != "bytes":
        return Change(name, b"", instead, rng.choice(["/etc/hostname", "nowhere", "../..", "/dev/null"]))
    ways = [spoilt_bytes, *[spoilt_json] * 4 * name.endswith(".json"), *[lying] * 2 * name.endswith(".safetensors")]
    return Change(name, rng.choice(ways)(rng, content))


def lying(rng: Random, content: bytes) -> bytes:
    """A safetensors file with another header, another length of it, or other data behind it."""
    length = int.from_bytes(content[:8], "little")
    told, data = content[8 : 8 + length], content[8 + length :]
    how = rng.choice(["entry", "entry", "entry", "json", "length", "data"])
    if how == "data":
        nan = b"\xff" * len(data)
        return content[: 8 + length] + rng.choice([data[:-4], data + b"\0" * 8, b"", nan, bytes(len(data))])
    if how == "length":
        return rng.choice([0, 1, length - 1, length + 1, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little") + told + data
    if how == "json":
        told = spoilt_json(rng, told)
    else:
        record = json.loads(told)
        entry = record[rng.choice(sorted(record))]
        entry[rng.choice(["dtype", "shape", "data_offsets", "x"])] = _lie(rng)
        told = json.dumps(record).encode()
    return len(told).to_bytes(8, "little") + told + data


def _lie(rng: Random) -> Any:
    numbers = [rng.choice([-1, 0, 1, 2, 4, 2**31, 2**62, 2**64]) for _ in range(rng.randint(0, 3))]
    return rng.choice([numbers, numbers, "F16", "BF16", "F64", "I64", "F8_E4M3", "BOOL", "X", "", None, 1])


def spoilt_bytes(rng: Random, content: bytes) -> bytes:
    """Cut, flipped, emptied, in another encoding, or something else altogether."""
    how = rng.choice(["cut", "cut", "flip", "flip", "flip", "insert", "twice", "other", "encoding"])
    place = rng.randint(0, rng.choice([len(content), min(400, len(content))]))
    before, after = content[:place], content[place:]
    if how == "cut":
        return before
    if how == "flip":
        return before + bytes(b ^ rng.choice([255, 1, 128]) for b in after[:1]) + after[1:]
    if how == "insert":
        return before + rng.choice([b"\0", b"\xff\xfe", b"}", b'"', b"\n" * 9, b"\xc3"]) + after
    if how == "twice":
        return content + content
    if how == "other":
        return rng.choice([b"", b"\0" * 64, b"{}", b"[]", b"null", b"1", b"\x80\x04.", b"PK\x03\x04", b"GIF89a"])
    try:
        return content.decode().encode(rng.choice(["utf-8-sig", "utf-16", "utf-32"]))
    except UnicodeDecodeError:
        return content[::-1]


def spoilt_json(rng: Random, content: bytes) -> bytes:
    """The same JSON with a key gone, renamed, doubled or added, or with another value, at a random place."""
    value = json.loads(content)
    how = rng.choice([*["value"] * 12, "gone", "gone", "renamed", "added", "doubled", "deep", "nested"])
    if how == "deep":
        return b"[" * 100_000 + content
    if how == "doubled":
        return content.replace(b"{", b'{"type": 1, "type": 2, ', 1)
    places = _places(value)
    if not places:
        return json.dumps(rng.choice(JUNK)).encode()
    parent, key = rng.choice(places)
    if how in ("gone", "renamed"):
        item = parent.pop(key)
        if how == "renamed" and isinstance(parent, dict):
            parent[misspelt(rng, str(key))] = item
    elif how == "added" and isinstance(parent, dict):
        parent["added"] = rng.choice(JUNK)
    elif how == "nested":
        parent[key] = [parent[key]]
    else:
        parent[key] = rng.choice(JUNK)
    return json.dumps(value).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it, the outer ones first; of a long list its beginning."""
    found, waiting = [], [value] if isinstance(value, (dict, list)) else []
    while waiting:
        container = waiting.pop(0)
        keys: Sequence[Any] = [*container] if isinstance(container, dict) else range(min(3, len(container)))
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return found[:200]


def misspelt(rng: Random, each: str) -> str:
    place = rng.randint(0, len(each))
    return each[:place] + rng.choice(["", "-", "s", "é", "."]) + each[place + rng.randint(0, 2) :]

"""Inputs of every kind: valid command lines and files, each spoilt in one to three places.

Noise alone would be refused at the first look; what is almost right gets deep. Numbers are small, or too large to be
meant: what lies between is no mistake, and only takes long.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fuzz.given import PIPELINES, REWARDS
from fuzz.sandbox import Change, Input
from leapalign.cli import COMMANDS

Files = dict[str, bytes]  # what is given, by path

CPU = ("--device", "cpu")
DRAWN = ("--steps", "2", "--size", "16", *CPU)
LINES: dict[str, tuple[tuple[str, ...], ...]] = {  # that end with 0 as they are; demo does not, it takes too long
    "train": (
        ("train", "sd3.json", "--steps", "1", "--batch-size", "2", "--out", "new", "--seed", "3"),
        ("train", "mine.py:tiny", "--out", "new", "--steps", "1", "--rewards.0.threshold", "0.5", "--json"),
        ("train", "sd3.json", "--dry-run", "--batch-size", "4", "--micro-batch-size", "2", "--graph", "blocks"),
        ("train", "sd3.json", "--max-hours", "1", "--learning-rate", "1e-3", "--method.nested-scale", "0.5"),
    ),
    "resume": (
        ("resume", "run", "--steps", "3", "--json"),
        ("resume", "run", "--checkpoint", "step-000001", "--allow-changes", "--max-hours", "0"),
        ("resume", "lora", "--steps", "2", "--plugin", "mine.py"),
    ),
    "sample": (
        ("sample", "sd3", "--prompt", "a red circle", *DRAWN, "--out", "new", "--num", "2", "--seed", "1"),
        ("sample", "run", "--prompt", "a", "blue", "--steps", "1", "--guidance", "2", "--overwrite", "--json"),
        ("sample", "lora", "--prompt", "two green star", *DRAWN, "--plugin", "mine.py"),
    ),
    "evaluate": (
        ("evaluate", "run", "--prompts", "prompts.jsonl", "--reward", "pickscore=clip", *CPU, "--out", "new"),
        ("evaluate", "run", "--against", "lora", "--prompts", "prompts.txt", "--num", "2", "--batch-size", "3"),
        ("evaluate", "run", "--per-task", "1", "--steps", "1", "--json", "--guidance", "1.5"),
    ),
    "score": (
        ("score", "picture.png", "picture.jpg", "--reward", "pickscore=clip", "--prompt", "a red circle", *CPU),
        ("score", "picture.webp", "picture.tiff", "--reward", "clipscore=clip", "--prompts", "prompts.txt", "--json"),
        ("score", "picture.gif", "picture.bmp", "--reward", "pickscore=clip", "--prompts", "prompts.csv"),
    ),
    "export": (
        ("export", "run", "--out", "new", "--format", "pipeline", "--dtype", "bfloat16"),
        ("export", "lora", "--out", "new", "--format", "comfyui", "--json"),
    ),
    "verify": (
        ("verify", "sd3", "--prompt", "a red circle", *DRAWN, "--seed", "2"),
        ("verify", "pickscore=clip", "--hashes", "SHA256SUMS", "--json"),
    ),
    "cache": (("cache", "--json"), ("cache", "--clear")),
    "list": (("list", "rewards", "--json"), ("list",)),
    "demo": (("demo", "--quick", "--seed", "1"),),
}
ABSURD = ("99999999999999999999", "-99999999999999999999", "9223372036854775807", "1" + "0" * 400)
WORDS = (
    *("", " ", "-1", "0", "1", "2", "3", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_0", "٣"),
    *("true", "None", "[]", "{}", "--", "-", "-h", "é", "\0", "a\0b", "\udcff", "\x1b[31m", "a\nb", "'", "\u202e"),
    *(".", "nowhere", "prompts.txt", "prompts.txt/x", "sd3", "clip", "run", "lora", "picture.png", "sd3.json"),
    *("mine.py", "mine.py:tiny", "mine.py:PROMPTS", "mine.py:", ".py:x", "/dev/null", "/dev/null/x", "~nobody/x"),
    *("x" * 300, "embedded:generator", "embedded:nothing", "embedded:../..", "embedded:", "org/name", "org/name@"),
    *("pickscore", "pickscore=", "=clip", "pickscore=sd3", "ocr", "custom", "shapeworld-leapalign", "meta", "cuda"),
    *("cuda:99", "cpu:7", "cpu", "mps", "float16", "bfloat16", "step-000001", "step-", "a red circle"),
    *ABSURD,
)
SWITCHES = ("--json", "--no-json", "--overwrite", "--allow-changes", "--dry-run", "--nonsense", "--steps", "--json=1")
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e-320, float("nan"), float("inf"), 2**63, -(2**63) - 1),
    *(10**30, "", "x", "\0", "é\u202e", "../../outside", "/etc/passwd", "1", "auto", "meta", [], [[]], [None], {}),
    *({"type": "x"}, {"type": "leapalign.methods.refl.ReFL"}, "os.system", "leapalign.models.sd3.SD3", "x" * 3000),
    *([1, 2, 3, 4, 5], {"a": {"b": {}}}, {"__class__": "x"}, ["os", "system"], "A" * 70000, "leapalign.cli.main"),
)


@st.composite
def flags(draw: st.DrawFn) -> Input:
    """A valid command line with words dropped, doubled, exchanged, replaced, misspelt or added."""
    command = draw(st.sampled_from([*LINES, *LINES, "train", "nothing"]))
    line = list(draw(st.sampled_from(LINES[command]))) if command in LINES else [draw(word())]
    for _ in range(draw(st.integers(1, 3))):
        line = draw(spoilt_line(line))
    if line and line[0] == "demo":  # where it is not refused it takes minutes
        line += ["--out", "sd3"]
    return Input("flags", tuple(line))


@st.composite
def spoilt_line(draw: st.DrawFn, line: list[str]) -> list[str]:
    place = draw(st.integers(0, max(0, len(line) - 1)))
    how = draw(st.sampled_from(["value", "value", "value", "drop", "double", "swap", "misspell", "add", "cut", "="]))
    before, at, after = line[:place], line[place : place + 1], line[place + 1 :]
    if how == "value":
        values = [i for i, each in enumerate(line) if not each.startswith("--") and i > 0] or [0]
        chosen = draw(st.sampled_from(values))
        return [*line[:chosen], draw(word()), *line[chosen + 1 :]]
    if how == "swap":
        return [*before, *after[:1], *at, *after[1:]]
    if how == "misspell":
        return [*before, *(draw(misspelt(each)) for each in at), *after]
    if how == "add":
        return [*before, draw(st.sampled_from(SWITCHES) | word()), *at, *after]
    if how == "=":
        return [*before, f"{at[0] if at else ''}={draw(word())}", *after]
    return {"drop": [*before, *after], "double": [*before, *at, *at, *after], "cut": before}[how]


def word() -> st.SearchStrategy[str]:
    return st.sampled_from(WORDS) | st.sampled_from([*COMMANDS]) | st.text("ab0-=é\0\u202e \n\"'{[", max_size=8)


@st.composite
def misspelt(draw: st.DrawFn, each: str) -> str:
    place = draw(st.integers(0, len(each)))
    return each[:place] + draw(st.sampled_from(["", "-", "s", "é", "."])) + each[place + draw(st.integers(0, 2)) :]


@st.composite
def run_json(draw: st.DrawFn, files: Files) -> Input:
    """A run's file, spoilt as JSON or as bytes, trained, planned or resumed."""
    way = draw(st.sampled_from([*["train"] * 5, *["resume"] * 3, "dry-run"]))
    name = "run/run.json" if way == "resume" else f"{draw(st.sampled_from(PIPELINES))}.json"
    change = Change(name, draw(spoilt_json(files[name]) | spoilt_bytes(files[name])))
    if way == "resume":
        allow = draw(st.sampled_from([(), ("--allow-changes",)]))
        return Input("run.json", ("resume", "run", *allow), (change,))
    return Input("run.json", ("train", name, *(("--dry-run",) if way == "dry-run" else ())), (change,))


@st.composite
def prompt_file(draw: st.DrawFn, files: Files) -> Input:
    """A file of prompts, read by each command that takes one."""
    suffix = draw(st.sampled_from(["txt", "jsonl", "csv"]))
    given = files[f"prompts.{suffix}"]
    content = draw(st.one_of(spoilt_bytes(given), lines_of(suffix), spoilt_lines(given) if suffix == "jsonl" else lines_of("txt")))
    name = f"mine.{draw(st.sampled_from([suffix] * 8 + ['', 'TXT', 'json']))}"
    line = draw(
        st.sampled_from([
            ("train", "sd3.json", "--prompts.path", name),
            ("evaluate", "run", "--steps", "1", *CPU, "--prompts", name, "--out", "new"),
            ("evaluate", "embedded:generator", "--steps", "2", *CPU, "--prompts", name),
            ("score", "picture.png", "--reward", "pickscore=clip", *CPU, "--prompts", name),
            ("score", "picture.png", "picture.jpg", "--reward", "pickscore=clip", *CPU, "--prompts", name),
        ])
    )
    return Input("prompts", line, (Change(name, content),))


@st.composite
def lines_of(draw: st.DrawFn, suffix: str) -> bytes:
    """Lines of every length and kind, in some encoding."""
    long = st.sampled_from(["a" * 1_000_000, "a red circle " * 80_000, '"' * 1_000_000, "[" * 1_000_000])
    odd = st.sampled_from(["", " ", "\t", "\ufeff", "a\0b", "\x0c", "\u2028", "\r", "\x1b[2J", ",", '"', "a,b", "é" * 99])
    objects = st.sampled_from(JUNK).map(json.dumps) | st.sampled_from(JUNK).map(lambda v: json.dumps({"prompt": v}))
    plain = st.sampled_from(["a red circle", "two green star", '{"prompt": "a star"}', "prompt", "prompt,prompt", "x,prompt"])
    lines = draw(st.lists(st.one_of(plain, plain, odd, objects, long if draw(st.integers(0, 9)) == 0 else odd), max_size=6))
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join([*(["prompt"] if suffix == "csv" else []), *lines])
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32-le", "latin-1", "cp500"]))
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


@st.composite
def spoilt_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """One of the objects of a .jsonl file spoilt: GenEval's metadata with other types."""
    lines = content.splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(spoilt_json(lines[place])).replace(b"\n", b" ")
    return b"\n".join(lines)


@st.composite
def pipeline(draw: st.DrawFn, files: Files) -> Input:
    """A pipeline folder with a damaged file."""
    name = draw(st.sampled_from([*PIPELINES, "sd3", "run/pipeline", "lora/lora"]))
    source = name.partition("/")[0]
    lines = [
        ("sample", source, "--prompt", "a red circle", *DRAWN),
        ("verify", source, *DRAWN, "--prompt", "a red circle"),
    ]
    if source in PIPELINES:
        lines += [("train", f"{source}.json")] * 3 + [("train", f"{source}.json", "--dry-run")]
    else:
        lines += [("export", source, "--out", "new"), ("evaluate", source, "--steps", "1", "--prompts", "prompts.txt")]
    return Input("pipeline", draw(st.sampled_from(lines)), draw(damage(files, name)))


@st.composite
def reward(draw: st.DrawFn, files: Files) -> Input:
    """A reward's folder with a damaged file."""
    name = draw(st.sampled_from([*REWARDS, "clip"]))
    user = {"clip": "sd3", "hpsv2": "flux", "hpsv3": "flux2", "imagereward": "qwen-image", "aesthetic": "z-image"}[name]
    word = f"{'pickscore' if name == 'clip' else name}={'clip' if name == 'aesthetic' else name}"
    lines = [*[("train", f"{user}.json")] * 3, ("verify", word)]
    if name == "clip":
        lines += [("score", "picture.png", "--reward", word, "--prompt", "a star")]
    return Input("reward", draw(st.sampled_from(lines)), draw(damage(files, name)))


@st.composite
def checkpoint(draw: st.DrawFn, files: Files) -> Input:
    """A run's folder with a damaged file, or a forged one whose own checksum is right."""
    name = draw(st.sampled_from(["run", "run", "lora"]))
    changes = draw(damage(files, f"{name}/checkpoints", f"{name}/metrics.jsonl", f"{name}/run.json", f"{name}/summary.json"))
    line = ["resume", name, "--steps", "3"]
    line += draw(st.sampled_from([[], [], ["--checkpoint", "step-000001"], ["--allow-changes"]]))
    forged = draw(st.booleans()) and all(change.instead == "bytes" for change in changes)
    return Input("checkpoint", tuple(line), (*changes, *_forged(files, changes)) if forged else changes)


def _forged(files: Files, changes: tuple[Change, ...]) -> list[Change]:
    """state.json as if the changed files of its checkpoint had been written so."""
    import hashlib

    from leapalign.training.checkpoints import _digest

    told = []
    for change in changes:
        folder, _, name = change.path.rpartition("/")
        state_file = f"{folder}/state.json"
        if state_file not in files:
            continue
        try:
            state = json.loads(change.content if name == "state.json" else files[state_file])
            state.pop("self", None)
            if name in state["files"]:
                state["files"][name] = hashlib.sha256(change.content).hexdigest()
            told.append(Change(state_file, json.dumps(state | {"self": _digest(state)}).encode()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return told


@st.composite
def picture(draw: st.DrawFn, files: Files) -> Input:
    """A picture file, damaged or with another name."""
    names = [name for name in files if name.startswith("picture.")]
    name = draw(st.sampled_from(names))
    place = draw(st.sampled_from([name, name, *names, "picture", "picture.txt"]))
    changes = draw(damage(files, name)) if draw(st.integers(0, 4)) == 0 else (Change(place, draw(spoilt_bytes(files[name]))),)
    line = ("score", place, "--reward", "pickscore=clip", "--prompt", "a star", *CPU)
    return Input("picture", line, changes)


@st.composite
def header(draw: st.DrawFn, files: Files) -> Input:
    """A safetensors file whose header lies."""
    name = draw(st.sampled_from([name for name in files if name.endswith(".safetensors") and not name.startswith("run")]))
    top = name.partition("/")[0]
    user = {"clip": "sd3", "hpsv3": "flux2", "lora": "z-image"}.get(top, top)
    lines = [("train", f"{user}.json")]
    if top in PIPELINES:
        lines += [("verify", top, *DRAWN)]
        lines += [("train", f"{top}.json", "--model.transformer-file", name)] * ("transformer/" in name)
    if top == "clip":
        lines += [("verify", "pickscore=clip"), ("score", "picture.png", "--reward", "pickscore=clip", "--prompt", "a")]
    if top == "lora":
        lines = [("resume", "lora", "--steps", "2"), ("sample", "lora", "--prompt", "a star", *DRAWN), ("export", "lora", "--out", "new")]
    return Input("safetensors", draw(st.sampled_from(lines)), (Change(name, draw(lying(files[name]))),))


@st.composite
def lying(draw: st.DrawFn, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    told, data = content[8 : 8 + length], content[8 + length :]
    how = draw(st.sampled_from(["entry", "entry", "json", "length", "data"]))
    if how == "data":
        return content[: 8 + length] + draw(st.sampled_from([data[:-4], data + b"\0" * 8, b"", b"\xff" * len(data)]))
    if how == "length":
        return draw(st.sampled_from([0, 1, length - 1, length + 1, 2**63 - 1, 2**64 - 1])).to_bytes(8, "little") + told + data
    if how == "json":
        told = draw(spoilt_json(told))
    else:
        record = json.loads(told)
        entry = record[draw(st.sampled_from(sorted(record)))]
        entry |= draw(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), lies(), min_size=1))
        told = json.dumps(record).encode()
    return len(told).to_bytes(8, "little") + told + data


def lies() -> st.SearchStrategy[Any]:
    numbers = st.sampled_from([-1, 0, 1, 4, 2**31, 2**62, 2**64])
    return st.lists(numbers, max_size=3) | st.sampled_from(["F16", "BF16", "I64", "F8_E4M3", "BOOL", "X", "", None, 1])


@st.composite
def damage(draw: st.DrawFn, files: Files, *folders: str) -> tuple[Change, ...]:
    """One or two files below the folders: other bytes, other JSON, gone, a folder, or a link out of the folder."""
    names = [name for name in files if any(name == f or name.startswith(f"{f}/") for f in folders)]
    changes = {}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        name = draw(st.sampled_from(names))
        instead = draw(st.sampled_from(["bytes"] * 7 + ["gone", "folder", "link"]))
        content = b""
        if instead == "bytes":
            spoilt = [spoilt_bytes(files[name])]
            spoilt += [spoilt_json(files[name])] * 3 if name.endswith(".json") else []
            spoilt += [lying(files[name])] if name.endswith(".safetensors") else []
            content = draw(st.one_of(spoilt))
        target = draw(st.sampled_from(["/etc/hostname", "nowhere", "../..", "/dev/null"])) if instead == "link" else ""
        changes[name] = Change(name, content, instead, target)
    return tuple(changes.values())


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut, flipped, emptied, in another encoding, or something else altogether."""
    how = draw(st.sampled_from(["cut", "cut", "flip", "flip", "insert", "twice", "other", "encoding"]))
    place = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:place]
    if how == "flip":
        return content[:place] + bytes(255 - b for b in content[place : place + 1]) + content[place + 1 :]
    if how == "insert":
        return content[:place] + draw(st.sampled_from([b"\0", b"\xff\xfe", b"}", b'"', b"\n" * 9, b"\xc3"])) + content[place:]
    if how == "twice":
        return content + content
    if how == "other":
        return draw(st.sampled_from([b"", b"\0" * 64, b"{}", b"[]", b"null", b"1", b"\x80\x04.", b"PK\x03\x04", b"GIF89a"]))
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content[::-1]
    return text.encode(draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32"])))


@st.composite
def spoilt_json(draw: st.DrawFn, content: bytes) -> bytes:
    """The same JSON with a key gone, renamed, doubled or added, or with another value, at a random place."""
    value = json.loads(content)
    how = draw(st.sampled_from(["value"] * 6 + ["gone", "gone", "renamed", "added", "doubled", "deep", "nested"]))
    places = _places(value)
    if how == "deep":
        return b"[" * 100_000 + content
    if how == "doubled":
        return content.replace(b"{", b'{"type": 1, "type": 2, ', 1)
    if not places:
        return json.dumps(draw(st.sampled_from(JUNK))).encode()
    parent, key = draw(st.sampled_from(places))
    if how == "gone" or how == "renamed":
        item = parent.pop(key)
        if how == "renamed" and isinstance(parent, dict):
            parent[draw(misspelt(str(key)))] = item
    elif how == "added" and isinstance(parent, dict):
        parent["added"] = draw(st.sampled_from(JUNK))
    elif how == "nested":
        parent[key] = [parent[key]]
    else:
        parent[key] = draw(st.sampled_from(JUNK))
    return json.dumps(value).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it, the outer ones first; of a long list its beginning."""
    found, waiting = [], [value]
    while waiting:
        container = waiting.pop(0)
        keys = [*container] if isinstance(container, dict) else range(min(3, len(container)))
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return found[:200]


KINDS: dict[str, Callable[[Files], st.SearchStrategy[Input]]] = {
    "flags": lambda files: flags(),
    "run.json": run_json,
    "prompts": prompt_file,
    "pipeline": pipeline,
    "reward": reward,
    "checkpoint": checkpoint,
    "picture": picture,
    "safetensors": header,
}

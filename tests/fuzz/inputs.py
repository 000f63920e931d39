"""Inputs of every kind: valid command lines and files, each spoilt in one to three places.

Noise alone would be refused at the first look; what is almost right gets deep. Numbers are small, or too large to be
meant: what lies between is no mistake, and only takes long.

hypothesis draws a random generator for each input (and shrinks nothing: one to three changes are small enough). Left to
draw every choice, it would make most inputs from parts of those before, and see few different ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from random import Random

from hypothesis import strategies as st
from PIL import Image

from fuzz.given import PIPELINES, REWARDS
from fuzz.sandbox import Change, Files, Input
from fuzz.spoil import JUNK, damage, lying, misspelt, spoilt_bytes, spoilt_json
from leapalign.checkpoint.state import digest
from leapalign.cli import COMMANDS

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
    "diagnose": (
        ("diagnose", "swap", "run", "--prompts", "prompts.csv", "--at", "1", *CPU, "--out", "new"),
        ("diagnose", "exchange", "lora", "--per-task", "1", "--steps", "2", "--ranges", "1-1", "--json", *CPU),
    ),
    "score": (
        ("score", "picture.png", "picture.jpg", "--reward", "pickscore=clip", "--prompt", "a red circle", *CPU),
        ("score", "picture.webp", "picture.tiff", "--reward", "clipscore=clip", "--prompts", "prompts.txt", "--json"),
        ("score", "picture.gif", "picture.bmp", "--reward", "pickscore=clip", "--prompts", "prompts.csv"),
    ),
    "export": (
        ("export", "run", "--out", "new", "--format", "pipeline", "--dtype", "bfloat16"),
        ("export", "lora", "--out", "new", "--format", "lora", "--json"),
    ),
    "verify": (
        ("verify", "sd3", "--prompt", "a red circle", *DRAWN, "--seed", "2"),
        ("verify", "pickscore=clip", "--hashes", "SHA256SUMS", "--json"),
    ),
    "compare": (
        ("compare", "run", "lora", "--markdown", "new.md", "--latex", "new.tex", "--overwrite"),
        ("compare", "run", "--csv", "new.csv", "--page", "new.html", "--json"),
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


def one_of(kind: str, files: Files) -> st.SearchStrategy[Input]:
    """Inputs of a kind."""
    return st.randoms(use_true_random=True).map(lambda rng: KINDS[kind](rng, files))


def flags(rng: Random, files: Files) -> Input:
    """A valid command line with words dropped, doubled, exchanged, replaced, misspelt or added."""
    command = rng.choice([*LINES, *LINES, "train", "nothing"])
    line = [*rng.choice(LINES[command])] if command in LINES else [word(rng)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        line = spoilt_line(rng, line)
    if line and line[0] == "demo":  # where it is not refused it takes minutes
        line += ["--out", "sd3"]
    return Input("flags", tuple(line))


def spoilt_line(rng: Random, line: list[str]) -> list[str]:
    """One place of it changed, most often a value."""
    place = rng.randrange(len(line) or 1)
    before, at, after = line[:place], line[place : place + 1], line[place + 1 :]
    how = rng.choice([*["value"] * 8, "drop", "double", "swap", "misspell", "add", "cut", "="])
    if how == "value":
        place = rng.choice([i for i, each in enumerate(line) if not each.startswith("--") and i > 0] or [0])
        return [*line[:place], word(rng), *line[place + 1 :]]
    if how == "swap":
        return [*before, *after[:1], *at, *after[1:]]
    if how == "misspell":
        return [*before, *(misspelt(rng, each) for each in at), *after]
    if how == "add":
        return [*before, rng.choice([*SWITCHES, word(rng)]), *at, *after]
    if how == "=":
        return [*before, f"{at[0] if at else ''}={word(rng)}", *after]
    return {"drop": [*before, *after], "double": [*before, *at, *at, *after], "cut": before}[how]


def word(rng: Random) -> str:
    return rng.choice(
        [*WORDS, rng.choice([*COMMANDS]), "".join(rng.choices("ab0-=é\0\u202e \n\"'{[", k=rng.randint(1, 8)))]
    )


def run_json(rng: Random, files: Files) -> Input:
    """A run's file, spoilt as JSON or as bytes, trained, planned or resumed."""
    way = rng.choice([*["train"] * 5, *["resume"] * 3, "dry-run"])
    name = "run/run.json" if way == "resume" else f"{rng.choice(PIPELINES)}.json"
    change = Change(name, rng.choice([spoilt_json, spoilt_json, spoilt_json, spoilt_bytes])(rng, files[name]))
    if way == "resume":
        return Input("run.json", ("resume", "run", *rng.choice([(), ("--allow-changes",)])), (change,))
    return Input("run.json", ("train", name, "--out", "new", *(("--dry-run",) if way == "dry-run" else ())), (change,))


def prompt_file(rng: Random, files: Files) -> Input:
    """A file of prompts, read by each command that takes one."""
    suffix = rng.choice(["txt", "jsonl", "csv"])
    given = files[f"prompts.{suffix}"]
    ways = [spoilt_bytes(rng, given), lines_of(rng, suffix)]
    ways += [spoilt_lines(rng, given)] * 2 if suffix == "jsonl" else []
    if rng.random() < 0.1:
        content = spoilt_json(rng, files["drawbench.json"])
        return Input("prompts", ("train", "z-image.json"), (Change("drawbench.json", content),))
    name = f"mine.{rng.choice([*[suffix] * 12, '', 'TXT', 'json'])}"
    score = ("--reward", "pickscore=clip", *CPU, "--prompts", name)
    line = rng.choice(
        [
            ("train", "sd3.json", "--prompts.path", name),
            ("evaluate", "run", "--steps", "1", *CPU, "--prompts", name, "--out", "new"),
            ("evaluate", "embedded:generator", "--steps", "2", *CPU, "--prompts", name),
            ("score", "picture.png", *score),
            ("score", "picture.png", "picture.jpg", *score),
        ]
    )
    return Input("prompts", line, (Change(name, rng.choice(ways)),))


def lines_of(rng: Random, suffix: str) -> bytes:
    """Lines of every length and kind, in some encoding."""
    lines = [_line(rng) for _ in range(rng.randint(0, 6))]
    if suffix == "jsonl":
        lines = [rng.choice([line, json.dumps({"prompt": line})]) for line in lines]
    text = rng.choice(["\n", "\r\n", "\r"]).join([*(["prompt"] if suffix == "csv" else []), *lines])
    encoding = rng.choice([*["utf-8"] * 6, "utf-8-sig", "utf-16", "utf-32-le", "latin-1", "cp500"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def _line(rng: Random) -> str:
    plain = ["a red circle", "two green star", '{"prompt": "a star"}', "prompt", "prompt,prompt", "x,prompt"]
    odd = ["", " ", "\t", "\ufeff", "a\0b", "\x0c", "\u2028", "\r", "\x1b[2J", ",", '"', "a,b", "é" * 99, "<|im_end|>"]
    long = ["a" * 1_000_000, "a red circle " * 80_000, '"' * 1_000_000, "[" * 1_000_000]
    value = rng.choice(JUNK)
    return rng.choice([*plain * 3, *odd, json.dumps(value), json.dumps({"prompt": value}), rng.choice(long)])


def spoilt_lines(rng: Random, content: bytes) -> bytes:
    """One of the objects of a .jsonl file spoilt: GenEval's metadata with other types."""
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = spoilt_json(rng, lines[place]).replace(b"\n", b" ")
    return b"\n".join(lines)


def pipeline(rng: Random, files: Files) -> Input:
    """A pipeline folder with a damaged file."""
    name = rng.choice([*PIPELINES, "sd3", "run/pipeline", "lora/lora"])
    source = name.partition("/")[0]
    sample = ("sample", source, "--prompt", "a red circle", *DRAWN)
    lines = [sample, ("verify", source, *DRAWN, "--prompt", "a red circle")]
    if source in PIPELINES:
        lines += [("train", f"{source}.json")] * 4 + [("train", f"{source}.json", "--dry-run")]
    else:
        lines += [("export", source, "--out", "new"), ("evaluate", source, "--steps", "1", "--prompts", "prompts.txt")]
    return Input("pipeline", rng.choice(lines), damage(rng, files, name))


def reward(rng: Random, files: Files) -> Input:
    """A reward's folder with a damaged file."""
    name = rng.choice([*REWARDS, "clip"])
    user = {"clip": "sd3", "hpsv2": "flux", "hpsv3": "flux2", "imagereward": "qwen-image", "aesthetic": "z-image"}[name]
    word = f"{'pickscore' if name == 'clip' else name}={'clip' if name == 'aesthetic' else name}"
    lines = [*[("train", f"{user}.json")] * 3, ("verify", word)]
    lines += [("score", "picture.png", "--reward", word, "--prompt", "a star")] if name == "clip" else []
    return Input("reward", rng.choice(lines), damage(rng, files, name))


def checkpoint(rng: Random, files: Files) -> Input:
    """A run's folder with a damaged file, or a forged one whose own checksum is right."""
    name = rng.choice(["run", "run", "lora"])
    beside = [f"{name}/{file}" for file in ("metrics.jsonl", "run.json", "summary.json")]
    changes = damage(rng, files, f"{name}/checkpoints", *(beside if rng.random() < 0.3 else []))
    line = ["resume", name, "--steps", "3"]
    line += rng.choice([[], [], ["--checkpoint", "step-000001"], ["--allow-changes"]])
    return Input("checkpoint", tuple(line), (*changes, *_forged(files, changes)) if rng.random() < 0.6 else changes)


def _forged(files: Files, changes: tuple[Change, ...]) -> list[Change]:
    """state.json as if the changed files of its checkpoint had been written so."""
    told = []
    for change in changes:
        folder, _, name = change.path.rpartition("/")
        state_file = f"{folder}/state.json"
        if state_file not in files or change.instead != "bytes":
            continue
        try:
            state = json.loads(change.content if name == "state.json" else files[state_file])
            state.pop("self", None)
            if name in state["files"]:
                state["files"][name] = hashlib.sha256(change.content).hexdigest()
            told.append(Change(state_file, json.dumps(state | {"self": digest(state)}).encode()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return told


def picture(rng: Random, files: Files) -> Input:
    """A picture file, damaged, of an odd size, or with another name."""
    names = [name for name in files if name.startswith("picture.")]
    name = rng.choice(names)
    place = rng.choice([name, name, *names, "picture", "picture.txt"])
    if rng.random() < 0.2:
        place, changes = name, damage(rng, files, name)
    else:
        content = rng.choice([spoilt_bytes, spoilt_bytes, odd_picture])(rng, files[name])
        changes = (Change(place, content),)
    return Input("picture", ("score", place, "--reward", "pickscore=clip", "--prompt", "a star", *CPU), changes)


def odd_picture(rng: Random, content: bytes) -> bytes:
    """Of every mode and of extreme sizes."""
    mode = rng.choice(["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV"])
    size = rng.choice([(1, 1), (1, 2), (3000, 1), (1, 40_000), (7, 5)])
    formats = ["PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP"]
    for form in rng.sample(formats, len(formats)):
        stream = BytesIO()
        try:
            Image.new(mode, size).save(stream, form)
        except (OSError, ValueError, KeyError):  # not every format has every mode
            continue
        return stream.getvalue()
    return content


def header(rng: Random, files: Files) -> Input:
    """A safetensors file whose header lies."""
    name = rng.choice([n for n in files if n.endswith(".safetensors") and not n.startswith("run")])
    top = name.partition("/")[0]
    user = {"clip": "sd3", "hpsv3": "flux2", "aesthetic": "z-image"}.get(top, top)
    lines = [("train", f"{user}.json")]
    if top in PIPELINES:
        lines += [("verify", top, *DRAWN)]
        lines += [("train", f"{top}.json", "--model.transformer-file", name)] * (
            "transformer/" in name and top in ("sd3", "flux")
        )
    if top == "clip":
        lines += [("verify", "pickscore=clip"), ("score", "picture.png", "--reward", "pickscore=clip", "--prompt", "a")]
    if top == "lora":
        lines = [("resume", "lora", "--steps", "2"), ("sample", "lora", "--prompt", "a star", *DRAWN)]
        lines += [("export", "lora", "--out", "new")]
    return Input("safetensors", rng.choice(lines), (Change(name, lying(rng, files[name])),))


KINDS: dict[str, Callable[[Random, Files], Input]] = {
    "flags": flags,
    "run.json": run_json,
    "prompts": prompt_file,
    "pipeline": pipeline,
    "reward": reward,
    "checkpoint": checkpoint,
    "picture": picture,
    "safetensors": header,
}

"""Golden losses: short runs of the embedded recipes with stored numbers, so that a refactor can show it changes none.

    python benches/losses.py                    compare all variants with tests/losses/NAME.txt; exit 1 if one departs
    python benches/losses.py --only leapalign   compare one
    python benches/losses.py --write            store what this code computes

A file holds, per step, the loss, the rewards and the gradient norm as exact floats; then the reward of the averaged
weights on the fixed set of prompts before and after, and the sha256 of the trained weights and of their saved average.

On a machine of the class in the file's header (`machine_class`) every character must agree. On another one, kernels
add in another order, the numbers may depart by a `Tolerance`, and hashes and evaluation rewards are not compared.

Only entry points that a refactor keeps are used: leapalign.recipes, `train`, and the files in the run's folder
(metrics.jsonl, checkpoints, the saved pipeline or adapter).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import safe_open

from leapalign.monitors import NEVER, NOTHING
from leapalign.recipes import RECIPES
from leapalign.run import Run
from leapalign.training.loop import train

STORED = Path(__file__).parents[1] / "tests" / "losses"
TINY = {"batch_size": 4, "micro_batch_size": 2, "num_sampling_steps": 4, "evaluation_size": 4}
TINY |= {"device": "cpu", "self_checks": False}  # the checks change no number and take seconds
UNWATCHED = {"monitors": NOTHING, "stop_when": NEVER}  # nor do monitors; the average is that of the last step


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Allowed departures, as shares of a column's largest absolute value, in the first `steps` steps."""

    scores: float  # loss and rewards
    grad_norm: float
    steps: int

    def of(self, column: str) -> float:
        """The share of one column; 0 for the number of the step."""
        return {"step": 0.0, "grad_norm": self.grad_norm}.get(column, self.scores)


EXACT = Tolerance(scores=0.0, grad_norm=0.0, steps=10**9)
# Measured with torch 2.13.0 on an AMD EPYC (family 26, AVX-512), against its own stored numbers, the largest of:
# ATEN_CPU_CAPABILITY=default; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE; --threads 2.
# float32: 1.3e-7 at step 1, grown by step 20 to 1.3e-4 (scores) and 7.9e-3 (gradient norm); about 7 times that.
FLOAT32 = Tolerance(scores=1e-3, grad_norm=5e-2, steps=20)
# bfloat16: 1.6e-3 (scores) and 6e-4 (gradient norm) at step 1, but 0.8 at step 2, where one sample's gradient is steep.
BFLOAT16 = Tolerance(scores=1e-2, grad_norm=1e-2, steps=1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe, made tiny, and what else differs from it."""

    recipe: str
    steps: int = 20
    ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Tolerance = FLOAT32  # on a machine of another class

    def run(self, out: Path) -> Run:
        """The run that writes to `out`, with one checkpoint and two evaluations: at the start and at the end."""
        ends = {"steps": self.steps, "checkpoint_every": self.steps, "evaluate_every": self.steps}
        return replace(RECIPES[self.recipe](), out=str(out), **ends, **TINY, **UNWATCHED, **self.settings)


VARIANTS = {
    "leapalign": Variant(recipe="shapeworld-leapalign"),
    "leapalign-lora": Variant(recipe="shapeworld-leapalign-lora"),
    "leapalign-guided": Variant(recipe="shapeworld-leapalign-guided"),
    "leapalign-bf16": Variant(recipe="shapeworld-leapalign", settings={"dtype": "bfloat16"}, elsewhere=BFLOAT16),
    "leapalign-recomputed": Variant(recipe="shapeworld-leapalign", steps=5, settings={"graph": "blocks"}),
    "leapalign-replicated": Variant(recipe="shapeworld-leapalign", ranks=2, settings={"sharding": "replicate"}),
    "leapalign-sharded": Variant(recipe="shapeworld-leapalign", steps=10, ranks=2, settings={"sharding": "full"}),
    "refl": Variant(recipe="shapeworld-refl", steps=5),
    "draft-k": Variant(recipe="shapeworld-draft-k", steps=5),
    "draft-lv": Variant(recipe="shapeworld-draft-lv", steps=5),
    "drtune": Variant(recipe="shapeworld-drtune", steps=5),
    "alignprop": Variant(recipe="shapeworld-alignprop", steps=5),
}


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The numbers of one variant, as its text file holds them."""

    header: dict[str, str]  # recipe, settings, ranks, machine
    rows: list[dict[str, str]]  # column -> exact float, one row a step
    ends: dict[str, str]  # evaluation_reward, weights, average: after the last step


# --- run a variant ------------------------------------------------------------------------------------------------


def measure(variant: Variant, folder: Path) -> Losses:
    """Train in `folder`/run and read the numbers from the run's files."""
    out = folder / "run"
    if variant.ranks > 1:
        _train_on_ranks(variant, out)
    else:
        with redirect_stderr(io.StringIO()):  # progress lines
            train(variant.run(out))
    return read_run(out, header_of(variant))


def _train_on_ranks(variant: Variant, out: Path) -> None:
    """Start this script on every rank with torchrun; gloo connects them."""
    name = next(name for name, each in VARIANTS.items() if each == variant)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={variant.ranks}"]
    command = [*torchrun, __file__, "--only", name, "--train-into", str(out), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name}: the ranks ended with {done.returncode}\n{done.stderr[-4000:]}")


def header_of(variant: Variant) -> dict[str, str]:
    """What the numbers depend on, besides the code."""
    settings = {"steps": variant.steps} | TINY | variant.settings
    return {
        "recipe": variant.recipe,
        "settings": " ".join(f"{name}={value}" for name, value in settings.items()),
        "ranks": str(variant.ranks),
        "machine": machine_class(),
    }


def machine_class() -> str:
    """Same text, same numbers: torch's version and kernels, the processor's model, the number of threads."""
    kernels = torch.backends.cpu.get_cpu_capability()
    parts = [f"torch {torch.__version__}", platform.machine(), kernels, _processor()]
    return ", ".join([*parts, f"threads {torch.get_num_threads()}"])


def _processor() -> str:
    """Model name, family and model number: virtual machines give several generations one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return "/".join(facts.get(name, "?") for name in ("model name", "cpu family", "model"))


# --- read a run's folder ------------------------------------------------------------------------------------------


def read_run(out: Path, header: dict[str, str]) -> Losses:
    """The numbers in metrics.jsonl, and the hashes of the weights in the checkpoint and in what the run saved."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    saved = [*out.glob("pipeline/transformer/*.safetensors"), *out.glob("lora/*.safetensors")]
    ends = {
        "evaluation_reward": " ".join(repr(line["evaluation_reward"]) for line in lines if "evaluation_reward" in line),
        "weights": tensors_hash(out.glob("checkpoints/step-*/*.safetensors"), "weights"),
        "average": tensors_hash(saved),
    }
    return Losses(header=header, rows=[_row(line) for line in lines if "loss" in line], ends=ends)


def _row(metrics: Mapping[str, Any]) -> dict[str, str]:
    rewards = [name for name in metrics if name == "reward" or name.startswith("reward/")]
    return {name: repr(metrics[name]) for name in ("step", "loss", *rewards, "grad_norm")}


def tensors_hash(files: Iterable[Path], group: str = "") -> str:
    """sha256 over name, dtype and bytes of each tensor, by name.

    With `group`, of a checkpoint's tensors of that group: those of GROUP.safetensors, or the ranks' parts of
    GROUP/NAME, which are pieces of the first axis and so make up the whole tensor in the order of the ranks.
    """
    pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
    for path in sorted(files):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if not group or path.stem == group or key.startswith(f"{group}/"):
                    pieces[key.removeprefix(f"{group}/")].append(file.get_tensor(key))
    if not pieces:
        raise SystemExit(f"no tensors of {group or 'the saved average'} found; has the run's folder another layout?")
    digest = hashlib.sha256()
    for name in sorted(pieces):
        digest.update(f"{name} {pieces[name][0].dtype}".encode())
        for piece in pieces[name]:
            digest.update(piece.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- text files ---------------------------------------------------------------------------------------------------


def dumps(losses: Losses) -> str:
    """The text of a stored file."""
    columns = list(losses.rows[0])
    table = [columns, *([row[name] for name in columns] for row in losses.rows)]
    lines = [f"# {name}: {value}" for name, value in losses.header.items()]
    lines += [" ".join(cells) for cells in table] + [f"{name} {value}" for name, value in losses.ends.items()]
    return "\n".join(lines) + "\n"


def loads(text: str) -> Losses:
    """Read what `dumps` wrote."""
    lines = text.splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("#"))
    columns, *rest = [line.split() for line in lines if not line.startswith("#")]
    rows = [dict(zip(columns, cells)) for cells in rest if cells[0].isdigit()]
    return Losses(header=header, rows=rows, ends={name: " ".join(v) for name, *v in rest if not name.isdigit()})


# --- compare ------------------------------------------------------------------------------------------------------


def departures(stored: Losses, new: Losses, tolerance: Tolerance) -> list[str]:
    """One line for each number that departs, the first one first; none if all agree.

    EXACT wants equal texts, to the hashes at the end; any other tolerance compares rows only.
    """
    found = [
        f"{name}: {stored.header.get(name)} is stored, this is {new.header.get(name)}"
        for name in ("recipe", "settings", "ranks")
        if stored.header.get(name) != new.header.get(name)
    ]
    if len(stored.rows) != len(new.rows):
        found.append(f"{len(stored.rows)} steps are stored, this run has {len(new.rows)}")
    scales = _scales(stored)
    for old, now in list(zip(stored.rows, new.rows))[: tolerance.steps]:
        found += _row_departures(old, now, {name: tolerance.of(name) * scale for name, scale in scales.items()})
    if tolerance == EXACT:
        ends = stored.ends | new.ends
        found += [
            _line("end", n, stored.ends.get(n), new.ends.get(n)) for n in ends if stored.ends.get(n) != new.ends.get(n)
        ]
    return found


def largest_departure(stored: Losses, new: Losses) -> float:
    """The largest departure of any number, as a share of its column's largest absolute value."""
    scales = _scales(stored)
    pairs = ((name, old[name], now[name]) for old, now in zip(stored.rows, new.rows) for name in scales)
    return max(abs(float(a) - float(b)) / scales[name] for name, a, b in pairs)


def _scales(losses: Losses) -> dict[str, float]:
    return {name: max(abs(float(row[name])) for row in losses.rows) or 1.0 for name in losses.rows[0]}


def _row_departures(old: Mapping[str, str], now: Mapping[str, str], allowed: Mapping[str, float]) -> list[str]:
    names = list(dict.fromkeys([*old, *now]))
    return [
        _line(f"step {old['step']}", name, old.get(name), now.get(name))
        for name in names
        if not _agree(old.get(name), now.get(name), allowed.get(name, 0.0))
    ]


def _agree(old: str | None, now: str | None, allowed: float) -> bool:
    if old == now or old is None or now is None:
        return old == now
    return allowed > 0 and abs(float(old) - float(now)) <= allowed  # false of NaN


def _line(where: str, name: str, old: str | None, now: str | None) -> str:
    return f"{where}, {name}: {old} is stored, this run has {now}"


# --- command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare short runs with their stored losses."""

    write: bool = False
    """Store the numbers instead of comparing them."""
    only: str = ""
    """One variant by name; empty = all."""
    threads: int = 1
    """Of torch. The stored numbers are those of one thread; others are compared within the tolerance."""
    train_into: str = ""
    """Used between ranks: train the variant of --only in this folder, and do nothing else."""


def main(settings: Settings) -> int:
    """Run the variants one after another. Returns the exit status."""
    torch.set_num_threads(settings.threads)
    if settings.only and settings.only not in VARIANTS:
        raise SystemExit(f"--only {settings.only}: no such variant; there are {', '.join(VARIANTS)}")
    if settings.train_into:
        train(VARIANTS[settings.only].run(Path(settings.train_into)))
        return 0
    names = [settings.only] if settings.only else list(VARIANTS)
    return max(_one(name, settings.write) for name in names)


def _one(name: str, write: bool) -> int:
    """Run a variant and store it, or compare it and print the verdict; 1 if it departs."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        new = measure(VARIANTS[name], Path(scratch))
    seconds = f"{time.monotonic() - began:.1f} s"
    path = STORED / f"{name}.txt"
    if write:
        path.write_text(dumps(new), encoding="utf-8")
        print(f"{name}: stored, {seconds}", flush=True)
        return 0
    return _verdict(name, loads(path.read_text(encoding="utf-8")), new, seconds)


def _verdict(name: str, stored: Losses, new: Losses, seconds: str) -> int:
    same_class = stored.header["machine"] == new.header["machine"]
    tolerance = EXACT if same_class else VARIANTS[name].elsewhere
    found = departures(stored, new, tolerance)
    how = "exactly" if same_class else f"within {tolerance}, as this is another machine: {new.header['machine']}"
    if found:
        print(f"{name}: DEPARTS at {found[0]} ({len(found)} differences; compared {how}; {seconds})", flush=True)
        return 1
    print(
        f"{name}: same, compared {how} (largest departure {largest_departure(stored, new):.2g}, {seconds})", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))

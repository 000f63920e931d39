"""Memory of an update's backward: LeapAlign's is flat in T, and n leaps peak like one where only inputs are kept.

    python benches/memory.py > memory.json

For each method, T and graph setting, with fixed draws (leaps at even distances from the noise on, ReFL at its latest
step), one batch goes through the three phases of an update, and two things are counted in bytes:
- `saved`: what the graph holds for the backward when the rollout has ended (saved_tensors_hooks), each storage once,
  without parameters and buffers;
- `peak`: the most that is alive at any moment of a phase among what was made since the update began, recomputation
  and temporaries included. Phases: `rollout`, `reward` (decode, reward and their backward to the latent), `backward`.
  The weights have gradients before it begins, as in all but an update's first micro-batch; these, which every method
  needs, are not in it, but all that is held beside them is.
- `first`: the same of a first micro-batch, the gradients that begin to exist in it included. Here a method of one
  differentiated forward has an advantage that no order of work takes away: its gradients appear while its graph goes.
Counted are the storages of all tensors that operators return, on any device; scratch memory inside one operator is not
seen. Bytes, not times: equal on every machine with the same versions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from shared import Batch, facts, first_batch, gradient_at_latent, with_folders
from torch import Tensor, nn

from leapalign.methods.draft import DRaFT, DRaFTDraws
from leapalign.methods.leapalign import LeapAlign, LeapDraws
from leapalign.methods.refl import ReFL, ReFLDraws
from leapalign.planning.tensor_bytes import LiveBytes, Saved
from leapalign.recipes import shapeworld_leapalign
from leapalign.run import Run
from leapalign.training.engine import Engine, build

GRAPHS = ("all", "blocks", "inputs")
FLAT, LIKE_REFL = 1.02, 1.1  # bounds on the two ratios below


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Saved and peak bytes of the backward, as JSON on stdout."""

    steps: tuple[int, ...] = (10, 25, 50)
    """T, sampling steps of the rollout."""
    leaps: tuple[int, ...] = (1, 2, 3)
    batch_size: int = 8
    decode_chunk: int = 1
    """Images decoded and scored at a time: 1, so that the models' graphs are not hidden behind the decoder's."""
    full: bool = True
    """Full backpropagation as well (DRaFT-K with K = T): gigabytes at T = 50."""
    generator: str = "embedded:generator"
    reward: str = "embedded:reward"


# One measurement


def measure_update(engine: Engine, batch: Batch, method: Any, draws: Any) -> dict[str, Any]:
    """Rollout, gradient at the latent, backward: as in `leapalign.training.loop`, without the optimiser."""
    engine.optimizer.zero_grad(set_to_none=True)
    _, first = _one_micro_batch(engine, batch, method, draws)
    for weight in engine.parameters.values():
        weight.grad = torch.zeros_like(weight)
    saved, later = _one_micro_batch(engine, batch, method, draws)
    engine.optimizer.zero_grad(set_to_none=True)
    return {"saved": saved, "peak": max(later.values()), "peak_of": later, "first": max(first.values())}


def _one_micro_batch(engine: Engine, batch: Batch, method: Any, draws: Any) -> tuple[int, dict[str, int]]:
    """Bytes that the graph holds after the rollout, and the peak of each phase."""
    saved = Saved(constants(engine))
    with LiveBytes() as live:
        live.begin("rollout")
        with saved.hooks:
            surrogate = method(batch.velocity, batch.noise, engine.sigmas, draws)
        saved_bytes = saved.bytes()
        live.begin("reward")
        result = gradient_at_latent(engine, batch, surrogate)
        live.begin("backward")
        surrogate.backward(result.grad)
    return saved_bytes, live.peaks()


def constants(engine: Engine) -> list[Tensor]:
    """Weights and buffers of the policy, the decoder and the rewards."""
    modules = [engine.model.policy, getattr(getattr(engine.model, "decoder", None), "vae", None)]
    modules += [reward.network() for reward in engine.rewards.values()]
    return [t for m in modules if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())]


def cases(num_steps: int, leaps: Sequence[int], full: bool) -> dict[str, tuple[Any, Any]]:
    """Name -> method and its draws."""
    refl = ReFL()
    latest = max(1, round(refl.early_stop * num_steps))
    found: dict[str, tuple[Any, Any]] = {"refl": (refl, ReFLDraws(latest))}
    for n in leaps:
        steps = tuple(num_steps * i // n for i in range(n, 0, -1))  # evenly from T down
        found[f"leapalign-{n}"] = LeapAlign(num_leaps=n, weighting="d_0" if n == 1 else "both"), LeapDraws(steps)
    if full:
        found["full"] = DRaFT(num_last_steps=num_steps), DRaFTDraws()
    return found


# The table


def measure(run: Run, steps: Sequence[int], leaps: Sequence[int], full: bool) -> dict[str, Any]:
    """graph -> method -> T -> bytes; for any run, whose own method, graph and T do not matter."""
    table: dict[str, Any] = {}
    for graph in GRAPHS:
        engine = build(replace(run, graph=graph))
        batch = first_batch(engine)
        gradient_at_latent(engine, batch, ReFL()(batch.velocity, batch.noise, engine.sigmas, ReFLDraws(1)))  # caches
        rows: dict[str, dict[int, Any]] = {}
        for num_steps in steps:
            at = replace(engine, sigmas=engine.model.sigmas(num_steps).to(engine.sigmas.device))
            for name, (method, draws) in cases(num_steps, leaps, full).items():
                rows.setdefault(name, {})[num_steps] = measure_update(at, batch, method, draws)
                print(f"{graph:7} {name:12} T = {num_steps}", file=sys.stderr, flush=True)
        table[graph] = rows
    return table


def ratios(table: dict[str, Any]) -> dict[str, Any]:
    """Peaks of LeapAlign: at the largest T over the smallest; and, with only inputs kept, over ReFL's at the same T."""
    flat, like_refl = {}, {}
    for graph, rows in table.items():
        for name, row in rows.items():
            flat[f"{graph}/{name}"] = row[max(row)]["peak"] / row[min(row)]["peak"]
    for name, row in table["inputs"].items():
        if name.startswith("leapalign"):
            like_refl[name] = {
                key: max(_value(row[t], key) / _value(table["inputs"]["refl"][t], key) for t in row)
                for key in ("peak", "backward", "first")
            }
    return {"largest_T_over_smallest": flat, "inputs_over_refl": like_refl}


def _value(row: dict[str, Any], key: str) -> int:
    return row["peak_of"]["backward"] if key == "backward" else row[key]


def reached(found: dict[str, Any]) -> dict[str, bool]:
    """The two claims."""
    flat = [value for name, value in found["largest_T_over_smallest"].items() if "/leapalign" in name]
    like_refl = [value for row in found["inputs_over_refl"].values() for value in (row["peak"], row["backward"])]
    return {"flat_in_T": max(flat) <= FLAT, "inputs_peak_like_refl": max(like_refl) <= LIKE_REFL}


def recipe(bench: Memory) -> Run:
    run = with_folders(shapeworld_leapalign(), bench.generator, bench.reward)
    run = replace(run, batch_size=bench.batch_size, micro_batch_size=bench.batch_size, device="cpu")
    model = replace(run.model, decode_chunk=bench.decode_chunk)
    return replace(run, model=model, reward_chunk=bench.decode_chunk, steps=1, evaluation_size=1)


def main(bench: Memory) -> dict[str, Any]:
    table = measure(recipe(bench), bench.steps, bench.leaps, bench.full)
    found = ratios(table)
    return {"reached": reached(found), "bounds": {"flat": FLAT, "like_refl": LIKE_REFL}, "ratios": found} | {
        "bytes": table,
        **facts(bench),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Memory)), indent=2))

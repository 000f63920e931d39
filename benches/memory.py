"""Memory of an update's backward: LeapAlign's is flat in T, and n leaps peak like one where only inputs are kept.

    python benches/memory.py > memory.json

For each method, T and graph setting, with fixed draws (leaps at even distances from the noise on, ReFL at its latest
step), one batch goes through the three phases of an update, and two things are counted in bytes:
- `saved`: what the graph holds for the backward when the rollout has ended (saved_tensors_hooks), each storage once,
  without parameters and buffers;
- `peak`: the most that is alive at any moment of a phase among what was made since the update began, recomputation
  and temporaries included. Phases: `rollout`, `reward` (decode, reward and their backward to the latent), `backward`.
  The weights' own gradients and their partial sums are left out of `peak` (they are as large as the weights for every
  method, and exist before all but the first micro-batch) and are in `peak_with_gradients`.
Counted are the storages of all tensors that operators return, on any device; scratch memory inside one operator is not
seen. Bytes, not times: equal on every machine with the same versions.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import tyro
from shared import Batch, facts, first_batch, gradient_at_latent, with_folders
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leapalign.methods.draft import DRaFT, DRaFTDraws
from leapalign.methods.leapalign import LeapAlign, LeapDraws
from leapalign.methods.refl import ReFL, ReFLDraws
from leapalign.recipes import shapeworld_leapalign
from leapalign.run import Run
from leapalign.training.loop import Engine, build

GRAPHS = ("all", "blocks", "inputs")
SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default, torch.ops.aten.clone.default)  # of gradients
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


# Counting


@dataclass(eq=False)
class LiveBytes(TorchDispatchMode):
    """Inside: every storage that an operator returns, from when it is made until it is freed."""

    events: list[tuple[int, int]] = field(default_factory=list)  # (which storage, + or - bytes), in time
    phases: list[tuple[str, int]] = field(default_factory=list)  # (name, number of events before it)
    living: dict[int, int] = field(default_factory=dict)  # address of a storage -> which
    sums: list[tuple[int, int]] = field(default_factory=list)  # (a sum or copy, what went into it)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {address(t) for t in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if address(tensor) not in given:  # a view of an argument, or a change in place, makes nothing
                self._made(tensor.untyped_storage())
        if func in SUMS:
            self._link(result, args)
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.living or not size:
            return
        which = self.living[place] = len(self.events)
        self.events.append((which, size))
        weakref.finalize(storage, self._freed, place, which, size).atexit = False

    def _link(self, result: Tensor, args: Any) -> None:
        terms = [self.living[address(t)] for t in tensors_of(args) if address(t) in self.living]
        self.sums += [(self.living[address(result)], term) for term in terms if address(result) in self.living]

    def _freed(self, place: int, which: int, size: int) -> None:
        self.events.append((which, -size))
        self.living.pop(place, None)

    def begin(self, phase: str) -> None:
        self.phases.append((phase, len(self.events)))

    def peaks(self, without: Iterable[Tensor] = ()) -> dict[str, int]:
        """The most bytes alive in each phase; `without` (living tensors) and what was added up to them do not count."""
        left_out = {self.living[address(t)] for t in without if address(t) in self.living}
        for total, term in reversed(self.sums):
            if total in left_out:
                left_out.add(term)
        now, highest, starts = 0, dict.fromkeys((name for name, _ in self.phases), 0), dict(self._starts())
        phase = ""
        for index, (which, change) in enumerate([*self.events, (-1, 0)]):
            phase = starts.get(index, phase)
            highest[phase] = max(highest.get(phase, 0), now)  # what a phase finds is alive in it
            now += 0 if which in left_out else change
            highest[phase] = max(highest[phase], now)
        return {name: highest[name] for name, _ in self.phases}

    def _starts(self) -> Iterable[tuple[int, str]]:
        return ((index, name) for name, index in self.phases)


class Saved:
    """Inside: what autograd saves; `bytes()` is what of it is still held."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self.besides = {address(t) for t in besides}
        self.kept: weakref.WeakSet[Kept] = weakref.WeakSet()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        self.kept.add(kept)
        return kept

    def bytes(self) -> int:
        sizes = {address(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in self.kept}
        return sum(size for place, size in sizes.items() if place not in self.besides)


@dataclass(eq=False)
class Kept:
    """A saved tensor; lives as long as the node of the graph that saved it."""

    tensor: Tensor


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


# One measurement


def measure_update(engine: Engine, batch: Batch, method: Any, draws: Any) -> dict[str, Any]:
    """Rollout, gradient at the latent, backward: as in `leapalign.training.loop`, without the optimiser."""
    weights = list(engine.parameters.values())
    engine.optimizer.zero_grad(set_to_none=True)
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
    gradients = [p.grad for p in weights if p.grad is not None]
    peaks, whole = live.peaks(without=gradients), live.peaks()
    engine.optimizer.zero_grad(set_to_none=True)
    return {"saved": saved_bytes, "peak": max(peaks.values()), "peak_of": peaks} | {
        "peak_with_gradients": max(whole.values())
    }


def constants(engine: Engine) -> list[Tensor]:
    """Weights and buffers of the policy, the decoder and the rewards."""
    modules = [engine.model.policy, getattr(getattr(engine.model, "decoder", None), "vae", None)]
    modules += [getattr(reward, "model", None) for reward in engine.rewards.values()]
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
                for key in ("peak", "backward", "peak_with_gradients")
            }
    return {"largest_T_over_smallest": flat, "inputs_over_refl": like_refl}


def _value(row: dict[str, Any], key: str) -> int:
    return row["peak_of"]["backward"] if key == "backward" else row[key]


def reached(found: dict[str, Any]) -> dict[str, bool]:
    """The two claims; both are about `peak`, without the weights' gradients."""
    flat = [value for name, value in found["largest_T_over_smallest"].items() if "/leapalign" in name]
    like_refl = [value for row in found["inputs_over_refl"].values() for value in (row["peak"], row["backward"])]
    return {"flat_in_T": max(flat) <= FLAT, "inputs_peak_like_refl": max(like_refl) <= LIKE_REFL}


def recipe(bench: Memory) -> Run:
    run = with_folders(shapeworld_leapalign(), bench.generator, bench.reward)
    run = replace(run, batch_size=bench.batch_size, micro_batch_size=bench.batch_size, device="cpu")
    model = replace(run.model, decode_chunk=bench.decode_chunk)
    return replace(run, model=model, reward_chunk=bench.decode_chunk, steps=1, probe_size=1)


def main(bench: Memory) -> dict[str, Any]:
    table = measure(recipe(bench), bench.steps, bench.leaps, bench.full)
    found = ratios(table)
    return {"reached": reached(found), "bounds": {"flat": FLAT, "like_refl": LIKE_REFL}, "ratios": found} | {
        "bytes": table,
        **facts(bench),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Memory)), indent=2))

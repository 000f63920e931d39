"""Gradient statistics on the embedded generator: how near each method's gradient is to full backpropagation's.

    python benches/gradients.py > gradients.json
    python benches/gradients.py --only full leapalign-a1 refl --batches 2 --draws 4

Gradients are those that `leapalign train` would hand to AdamW at the base's weights, unclipped: its own micro-batches,
rollout, objective and backward (`training.direct`), in float32. Each batch is used with several draws of the method,
and full backpropagation (DRaFT with K = T) has the same batches. Every sampling step has its own copy of the weights,
so that one backward gives the gradient of each step; their sum is the gradient of the shared weights.

- `cosine`: of the mean over batches and draws with full backpropagation's mean; `cosine_corrected`: without the part of
  the mean's norm that is noise of the draws. `bias`: sqrt(1 - cosine_corrected^2). `scale`: length along it, 1 = equal.
- `draw_noise`: standard deviation over the draws of one batch, over the mean's norm.
- `update_cosine`: of one update's gradient with full backpropagation's on the same batch, in the mean square: bias and
  noise of the draws together.
- `efficiency`: update_cosine^2 for each unit of compute, over full backpropagation's. If what departs from full
  backpropagation's gradient has no part along the gradient over all prompts and noises, this is the ratio of
  (signal / noise)^2. A unit is one forward of the generator for one sample, a backward counts 2, both counted while
  they run; rewards and decodes are not in it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import tyro
from shared import facts
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.methods.alignprop import AlignProp
from leapalign.methods.draft import DRaFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM
from leapalign.models.sd3 import SD3
from leapalign.monitors import NOTHING
from leapalign.recipes.shapeworld import shapeworld_rsm
from leapalign.training import direct
from leapalign.training.batches import MicroBatch
from leapalign.training.engine import Engine, build
from leapalign.tuning.full import FULL

FULL_NAME = "full"
BACKWARD = 2.0  # compute of a backward, in forwards
METHODS: dict[str, Any] = {
    "leapalign-a1": LeapAlign(nested_scale=1.0),
    "leapalign-a0.3": LeapAlign(nested_scale=0.3),
    "leapalign-a0": LeapAlign(nested_scale=0.0),
    "leapalign-a1-2-pairs": LeapAlign(nested_scale=1.0, pairs_per_rollout=2),
    "leapalign-a1-3-pairs": LeapAlign(nested_scale=1.0, pairs_per_rollout=3),
    "leapalign-a1-per-sample": LeapAlign(nested_scale=1.0, step_draws="per-sample"),
    "leapalign-a1-stratified": LeapAlign(nested_scale=1.0, step_draws="stratified"),
    "leapalign-a1-unweighted": LeapAlign(nested_scale=1.0, weighting="none"),
    "leapalign-a1-stratified-unweighted": LeapAlign(nested_scale=1.0, step_draws="stratified", weighting="none"),
    "refl": ReFL(),
    "draft-1": DRaFT(),
    "draft-2": DRaFT(num_last_steps=2),
    "draft-lv": DRaFTLV(),
    "drtune": DRTune(),
    "alignprop": AlignProp(),
    "flowbp-sparse": FlowBPSparse(),
    "flowbp-bridge": FlowBPBridge(),
    "flowbp-lagrange": FlowBPLagrange(),
    "rsm": RSM(),
}


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Compare methods' gradients with full backpropagation's at the base; JSON on stdout."""

    only: tuple[str, ...] = ()
    """Methods; empty = all. Full backpropagation is always measured."""
    batches: int = 4
    """Batches of prompts and noise, at least 2."""
    draws: int = 8
    """Draws of a method on each batch, at least 2."""
    batch_size: int = 32
    """Samples of a batch."""
    steps: int = 8
    """Sampling steps T."""
    seed: int = 0


class ByStep(nn.Module):
    """A policy with a copy of its weights for each sampling step, which counts its forwards and backwards by sample."""

    def __init__(self, policy: nn.Module, times: Tensor) -> None:
        super().__init__()
        self.policies = nn.ModuleList(copy.deepcopy(policy) for _ in times)
        self.times = times  # [T] of steps 1..T, in the scheduler's units
        self.forwards = self.backwards = 0

    def forward(self, *, timestep: Tensor, return_dict: bool, **inputs: Tensor) -> tuple[Tensor]:
        """Run each row on the copy of its step."""
        places = (timestep[:, None] - self.times).abs().argmin(1)
        if not bool(torch.isclose(self.times[places], timestep, rtol=1e-4).all()):
            raise ValueError(f"timesteps {timestep.tolist()} are not of the grid {self.times.tolist()}")
        out = torch.zeros_like(inputs["hidden_states"])
        for place in places.unique().tolist():
            rows = (places == place).nonzero().flatten()
            v = self.policies[place](
                timestep=timestep[rows], return_dict=False, **{name: value[rows] for name, value in inputs.items()}
            )[0]
            out = out.index_copy(0, rows, v)
        self._count(out)
        return (out,)

    def _count(self, v: Tensor) -> None:
        self.forwards += len(v)
        if v.requires_grad:
            v.register_hook(lambda grad: self._count_backward(len(grad)))

    def _count_backward(self, rows: int) -> None:
        self.backwards += rows


@dataclass(frozen=True, kw_only=True)
class ByStepSD3(SD3):
    """SD3 with `ByStep` as its policy."""

    num_steps: int

    def load(self, *args: Any, **settings: Any) -> Any:
        model = super().load(*args, **settings)
        model.policy = ByStep(model.policy, 1000 * model.sigmas(self.num_steps)[1:])
        return model


@dataclass(frozen=True, kw_only=True)
class OneBatch(Engine):
    """An engine whose updates all have the prompts and noise of update `batch`; an update's draws are its own."""

    batch: int = 0

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        for micro in super().micro_batches(self.batch):
            yield replace(micro, step=step)

    def noise(self, micro: MicroBatch, purpose: str = "noise") -> Tensor:
        return super().noise(replace(micro, step=self.batch), purpose)


@dataclass(kw_only=True, eq=False)
class Measured:
    """Sums over batches and draws of one method's gradients g [T, P]; totals are sums over the steps, [P]."""

    by_step: Tensor  # [T, P], mean over batches and draws
    totals: list[Tensor] = field(default_factory=list)  # of each batch, mean over the draws
    draws: int  # on each batch
    draw_variance: list[float] = field(default_factory=list)  # of each batch
    squares: list[float] = field(default_factory=list)  # of each batch: mean of |g|^2 over the draws
    forwards: float = 0.0  # per update and sample
    backwards: float = 0.0


def main(bench: Gradients) -> dict[str, Any]:
    """method -> its statistics, with those of each step (noisiest first); and facts."""
    if unknown := [name for name in bench.only if name not in (FULL_NAME, *METHODS)]:
        raise UserError(f"--only {unknown[0]}: expected some of {FULL_NAME}, {', '.join(METHODS)}")
    if bench.batches < 2 or bench.draws < 2:
        raise UserError("--batches and --draws: give at least 2 of each, for the means and the draws' noise")
    torch.set_num_threads(1)
    engine, chosen = loaded(bench), [name for name in METHODS if not bench.only or name in bench.only]
    full = measure(engine, DRaFT(num_last_steps=bench.steps), bench.batches, 1)
    whole = statistics(full, full)
    found = {FULL_NAME: whole}
    for name in chosen:
        begun = time.monotonic()
        found[name] = statistics(measure(engine, METHODS[name], bench.batches, bench.draws), full)
        print(f"{name}: cosine {found[name]['cosine']:.3f}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    for row in found.values():
        row["efficiency"] = row["update_cosine"] ** 2 * whole["compute"] / row["compute"]
    return {"methods": found} | facts(bench)


def loaded(bench: Gradients) -> OneBatch:
    """The ShapeWorld recipe's engine, with weights for each step; of RSM's recipe, whose anchor others do not use."""
    run = shapeworld_rsm()
    settings = {f.name: getattr(run.model, f.name) for f in fields(run.model)}
    run = replace(
        run,
        model=ByStepSD3(**settings, num_steps=bench.steps),
        tuning=FULL,
        steps=bench.batches,
        batch_size=bench.batch_size,
        micro_batch_size=bench.batch_size,
        num_sampling_steps=bench.steps,
        seed=bench.seed,
        device="cpu",
        evaluate_every=0,
        evaluation_size=1,
        monitors=NOTHING,
    )
    engine = build(run)
    return OneBatch(**{f.name: getattr(engine, f.name) for f in fields(engine)})


def measure(engine: OneBatch, method: Any, batches: int, draws: int) -> Measured:
    """Gradients of `draws` draws on each batch."""
    run = replace(engine.run, method=method)
    anchor = engine.anchor if isinstance(method, RSM) else None
    policy: Any = engine.model.policy
    policy.forwards = policy.backwards = 0
    found = Measured(by_step=torch.zeros(()), draws=draws)
    for batch in range(batches):
        here = replace(engine, run=run, anchor=anchor, batch=batch)
        total, squares = torch.zeros((), dtype=torch.float64), 0.0
        for step in range(draws):
            by_step = gradient(here, batch * draws + step)  # no two batches have the same draws
            found.by_step = found.by_step + by_step / (batches * draws)
            own = by_step.sum(0, dtype=torch.float64)  # [P]; sums of millions of squares follow
            total, squares = total + own / draws, squares + float(own.square().sum()) / draws
        found.totals.append(total)
        found.squares.append(squares)
        found.draw_variance.append(max(0.0, squares - float(total.square().sum())) * draws / max(1, draws - 1))
    samples = batches * draws * run.batch_size
    found.forwards, found.backwards = policy.forwards / samples, policy.backwards / samples
    return found


def gradient(engine: OneBatch, step: int) -> Tensor:
    """The update's gradient by sampling step: [T, P], step 1 first; zeros where a draw has none."""
    engine.optimizer.zero_grad(set_to_none=True)
    direct.on_new_rollouts(engine, step)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.parameters.values()]
    return torch.cat([grad.flatten() for grad in grads]).view(engine.run.num_sampling_steps, -1)


def statistics(found: Measured, full: Measured) -> dict[str, Any]:
    """JSON values of one method, in comparison with full backpropagation on the same batches."""
    mean, whole = torch.stack(found.totals).mean(0), torch.stack(full.totals).mean(0)
    along = float(mean @ whole) / float(whole.norm())
    of_draws = sum(found.draw_variance) / len(found.draw_variance)
    norm = float(mean.square().sum()) - of_draws / (len(found.totals) * found.draws)
    corrected = min(1.0, along / max(norm, 1e-30) ** 0.5)
    return {
        "cosine": along / max(float(mean.norm()), 1e-30),
        "cosine_corrected": corrected,
        "bias": (1 - corrected**2) ** 0.5,
        "scale": along / float(whole.norm()),
        "draw_noise": of_draws**0.5 / max(norm, 1e-30) ** 0.5,
        "update_cosine": update_cosine(found, full),
        "forwards": found.forwards,
        "backwards": found.backwards,
        "compute": found.forwards + BACKWARD * found.backwards,
        "steps": [step_row(t, found.by_step[t - 1], full.by_step[t - 1]) for t in range(len(full.by_step), 0, -1)],
    }


def update_cosine(found: Measured, full: Measured) -> float:
    """Mean <g, f> over root mean squares of |g| (over draws too) and |f|: one update's g, full backpropagation's f."""
    product = sum(float(g @ f) for g, f in zip(found.totals, full.totals))
    return product / max((sum(found.squares) * sum(full.squares)) ** 0.5, 1e-30)


def step_row(t: int, g: Tensor, whole: Tensor) -> Mapping[str, Any]:
    g, whole = g.double(), whole.double()
    norm, reference = float(g.norm()), float(whole.norm())
    cosine = float(g @ whole) / (norm * reference) if norm and reference else None
    return {"step": t, "norm": norm, "full_norm": reference, "cosine": cosine}


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Gradients)), indent=2))

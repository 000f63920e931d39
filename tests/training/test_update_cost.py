"""Costs of an update that are exact counts: graphs alive between micro-batches, and values the host waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from leapalign.methods.leapalign import LeapAlign
from leapalign.planning.tensor_bytes import Saved
from leapalign.run import RewardTerm
from leapalign.training import direct, loop


@dataclass(frozen=True, kw_only=True)
class AboveAfter:
    """A reward below the threshold for the first `calls` micro-batches and above it for the others."""

    name: ClassVar[str] = "above-after"

    differentiable: ClassVar[bool] = True

    calls: int

    def load(self, device="cpu", dtype="float32"):
        made = []

        def reward(images, prompts):
            made.append(len(images))
            return images.mean((1, 2, 3)) + (0 if len(made) <= self.calls else 100)

        return reward


@pytest.mark.parametrize("graph", ["all", "inputs"])
@pytest.mark.parametrize("below", [0, 1, 4])
def test_no_graph_outlives_its_micro_batch(tiny_run, monkeypatch, graph, below):
    """Also that of a micro-batch above the threshold, which has no backward to free it; nor in the optimiser's step."""
    term = RewardTerm(reward=AboveAfter(calls=below), threshold=2.0)
    engine = loop.build(tiny_run(rewards=(term,), graph=graph, micro_batch_size=1, batch_size=4))
    saved = Saved(engine.parameters.values())
    roll_out, found, at_step = LeapAlign.__call__, [], []

    def watched(*given):
        found.append(saved.bytes())
        surrogate = roll_out(*given)
        assert saved.bytes() > 0  # the graph of this rollout, so that one left alive would be seen
        return surrogate

    monkeypatch.setattr(LeapAlign, "__call__", watched)
    engine.optimizer.register_step_pre_hook(lambda *_: at_step.append(saved.bytes()))
    with saved.hooks:
        metrics = direct.update(engine, 0)
    assert metrics["fraction_above_threshold"] == 1 - below / 4
    assert found == [0] * 4
    assert at_step == ([0] if below else [])


class HostReads(TorchDispatchMode):
    """Inside, counts the values that Python asks of a tensor (item, bool, float, int): on a GPU the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(engine: loop.Engine) -> int:
    """In an update without AdamW's step, whose counts torch keeps on the CPU, a read a weight."""
    direct.update(engine, 0)  # whatever happens once
    engine.optimizer.step = lambda: None  # type: ignore[method-assign]
    with HostReads() as reads:
        direct.update(engine, 1)
    return reads.count


def test_a_micro_batch_waits_for_its_checks_and_an_update_for_its_norm(tiny_run):
    """Draw of k and j (2, on the CPU), the grid (2), latents, rewards, whether there is a gradient; then the norm."""
    reads = {n: host_reads(loop.build(tiny_run(batch_size=n, micro_batch_size=1))) for n in (2, 6)}
    each, rest = divmod(reads[6] - reads[2], 4)
    assert (each, rest) == (7, 0)
    assert reads[2] - 2 * each == 2


def test_more_weights_make_no_more_reads(tiny_run, tiny_module, monkeypatch):
    """AdamW, EMA, clipping and the norm leave every weight's numbers on the device."""
    few = host_reads(loop.build(tiny_run()))
    load = tiny_module.TinyModel.load

    def deeper(self, *given):
        model = load(self, *given)
        model.policy.append(torch.nn.Linear(48, 48)).append(torch.nn.Linear(48, 48))
        return model

    monkeypatch.setattr(tiny_module.TinyModel, "load", deeper)
    assert host_reads(loop.build(tiny_run())) == few

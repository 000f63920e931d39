"""Two experts by time: they begin as the base, are divided by time, and are saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from leapalign.methods.refl import ReFL
from leapalign.monitors import NEVER, NOTHING
from leapalign.recipes.shapeworld import shapeworld
from leapalign.run import Run
from leapalign.studies.arena.experts import TwoExperts, experts
from leapalign.training.loop import train


def small(out: Path) -> Run:
    run = experts().contender("refl").run
    small = {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "samples_per_draw": 0, "num_sampling_steps": 8}
    small |= {"warmup_steps": 0, "evaluate_every": 0, "monitors": NOTHING, "stop_when": NEVER, "self_checks": False}
    return replace(run, out=str(out), method=ReFL(early_stop=0.5), ema_decay=0.0, learning_rate=1e-3, **small)


def velocity(model, sigmas: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = model.noise([torch.Generator().manual_seed(i) for i in range(len(sigmas))])
        return model.velocity(model.encode(["a photo of a circle"] * len(sigmas)))(x, sigmas)


def test_a_late_method_trains_the_late_expert_alone(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    result = train(run)
    base = shapeworld(ReFL()).model.load("cpu", "float32")
    tuned = run.tuning.load_tuned(run.model, str(result.saved), "cpu", "float32")
    start = base.policy.state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in tuned.policy.early.state_dict().items())
    assert any(not torch.equal(start[name], weight) for name, weight in tuned.policy.late.state_dict().items())
    early, late = torch.tensor([0.9, 0.7]), torch.tensor([0.5, 0.1])
    assert torch.equal(velocity(tuned, early), velocity(base, early))
    assert not torch.allclose(velocity(tuned, late), velocity(base, late))
    mixed = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(velocity(tuned, mixed)[1], velocity(base, mixed)[1])
    assert not torch.allclose(velocity(tuned, mixed)[0], velocity(base, mixed)[0])


def test_the_boundary_lies_between_steps() -> None:
    model = experts().contenders[0].run.model
    assert isinstance(model, TwoExperts)
    sigmas = model.load("cpu", "float32").sigmas(8)
    assert (sigmas[1:] > model.boundary).tolist() == [False] * 4 + [True] * 4

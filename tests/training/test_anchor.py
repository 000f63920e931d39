"""The velocity anchor in the loop: the base is that of the run's start, and a resumed run has the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.flow.leap import per_sample
from leapalign.methods import LeapAlign, ReFL
from leapalign.run import RewardTerm, Run
from leapalign.training import direct, loop
from leapalign.training.reference import Reference
from leapalign.training.tracking import read_metrics
from leapalign.tuning.lora import LoRA


def embedded(**changes) -> Run:
    from leapalign.recipes import shapeworld_leapalign

    small = {"batch_size": 2, "micro_batch_size": 2, "num_sampling_steps": 3, "evaluation_size": 2, "device": "cpu"}
    return replace(shapeworld_leapalign(), **(small | changes))


def drifts(run: Run) -> list[float]:
    return [row["anchor"] for row in read_metrics(Path(run.out)) if "anchor" in row]


@pytest.mark.parametrize(
    "method", [LeapAlign(), LeapAlign(pairs_per_rollout=2), ReFL()], ids=["leaps", "pairs", "refl"]
)
def test_a_stronger_anchor_drifts_less(tiny_run, tmp_path, method):
    same = {"method": method, "steps": 8, "checkpoint_every": 8}
    runs = [tiny_run(**same, anchor_weight=beta, out=str(tmp_path / str(beta))) for beta in (1e-9, 3000.0)]
    for run in runs:
        loop.train(run)
    free, held = map(drifts, runs)
    assert free[0] == held[0] == 0 and len(free) == 8
    assert 0 < held[-1] < 0.3 * free[-1]


def test_a_resumed_run_is_held_to_the_same_base(tiny_run, tmp_path):
    same = {
        "steps": 6,
        "anchor_weight": 50.0,
        "anchor_mean_weight": 90.0,
        "micro_batch_size": 4,
        "method": LeapAlign(pairs_per_rollout=2, step_draws="per-sample"),
    }
    whole = loop.train(tiny_run(**same, out=str(tmp_path / "whole")))
    part = tiny_run(**same, out=str(tmp_path / "part"))
    loop.train(replace(part, steps=4))
    resumed = loop.train(part, resume=True)
    for name, p in whole.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name])
    assert drifts(tiny_run(out=str(tmp_path / "whole"))) == drifts(part)


def test_a_batch_above_the_threshold_is_held_too(tiny_run):
    run = tiny_run(rewards=(replace(tiny_run().rewards[0], threshold=-5.0),), anchor_weight=10.0)
    engine = loop.build(run)
    with torch.no_grad():
        next(iter(engine.parameters.values())).add_(0.1)
    assert direct.update(engine, 0)["skipped"] == 0
    free = loop.build(replace(run, anchor_weight=0.0))
    assert direct.update(free, 0)["skipped"] == 1


@pytest.mark.parametrize("tuning", [None, LoRA(rank=2, init="gaussian")], ids=["full", "lora"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_real_classes_begin_at_drift_zero_and_are_pulled_back(tuning, guidance):
    run = embedded(anchor_weight=1.0, rewards=(RewardTerm(reward=embedded().rewards[0].reward, threshold=-9.0),))
    run = replace(
        run, model=replace(run.model, guidance_scale=guidance), ema_decay=0.0, weight_decay=0.0, warmup_steps=0
    )
    engine = loop.build(replace(run, tuning=tuning) if tuning else run)
    assert direct.update(engine, 0)["anchor"] == 0
    with torch.no_grad():
        for p in engine.parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    measured = [direct.update(engine, 0)["anchor"] for _ in range(8)]  # the same batch: only the weights differ
    assert measured[0] > 0 and measured[-1] < 0.8 * measured[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_base_bit_for_bit_and_is_taken_off_again(dtype):
    engine = loop.build(embedded(dtype=dtype, anchor_weight=1.0))
    prompts = [prompt.text for prompt in engine.prompts[:2]]
    engine.model.prepare(prompts)
    x, sigma = engine.model.noise([torch.Generator().manual_seed(i) for i in range(2)]), torch.tensor(0.7)
    velocity = engine.model.velocity(engine.model.encode(prompts))
    with torch.no_grad():
        base = velocity(x, sigma)
        own = {name: p.add_(0.01).clone() for name, p in engine.parameters.items()}
        moved = velocity(x, sigma)
        assert engine.anchor is not None
        with engine.anchor.reference():
            assert torch.equal(velocity(x, sigma), base)
        assert torch.equal(velocity(x, sigma), moved) and not torch.equal(moved, base)
    assert all(torch.equal(p, own[name]) and p.dtype == own[name].dtype for name, p in engine.parameters.items())


def test_a_bfloat16_reference_takes_half_the_memory():
    engine = loop.build(embedded(dtype="bfloat16"))
    sizes = {}
    for half in (False, True):
        copies = Reference(engine.model.policy, engine.parameters, bfloat16=half, shards=None).copies.values()
        sizes[half] = sum(c.numel() * c.element_size() for c in copies)
    assert sizes[True] < 0.52 * sizes[False]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_each_sample_may_have_its_own_sigma(guidance):
    engine = loop.build(embedded(model=replace(embedded().model, guidance_scale=guidance)))
    prompts = [prompt.text for prompt in engine.prompts[:3]]
    engine.model.prepare(prompts)
    x = engine.model.noise([torch.Generator().manual_seed(i) for i in range(3)])
    sigma = torch.tensor([1.0, 0.3, 0.6])
    with torch.no_grad():
        together = engine.model.velocity(engine.model.encode(prompts))(x, sigma)
        alone = [engine.model.velocity(engine.model.encode([prompts[i]]))(x[i : i + 1], sigma[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert per_sample(sigma, x).shape == (3, 1, 1, 1)


def test_the_mean_is_over_the_whole_batch(tiny_run):
    with pytest.raises(UserError, match="a micro-batch has 2 of 4 samples; set micro_batch_size to 4"):
        loop.build(tiny_run(anchor_mean_weight=1.0))
    with pytest.raises(UserError, match="on several ranks; use one"):
        loop.build(tiny_run(anchor_mean_weight=1.0, micro_batch_size=4), World(rank=0, size=2))
    assert loop.build(tiny_run(anchor_mean_weight=1.0, micro_batch_size=4)).anchor is not None

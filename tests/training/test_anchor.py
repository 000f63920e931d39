"""The velocity anchor in the loop: the base is that of the run's start, and a resumed run has the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leapalign.distributed.fsdp import repeated_blocks
from leapalign.errors import UserError
from leapalign.flow.leap import per_sample
from leapalign.methods import RSM, AlignProp, DRaFT, DRaFTLV, LeapAlign, ReFL
from leapalign.monitors import NEVER, Monitors
from leapalign.run import RewardTerm, Run
from leapalign.training import direct, fixed_set, loop
from leapalign.training.reference import Reference
from leapalign.training.refusals import refuse_sharded_base
from leapalign.training.tracking import read_metrics
from leapalign.tuning.lora import LoRA

PAIRS = LeapAlign(pairs_per_rollout=2, step_draws="stratified")


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


@pytest.mark.parametrize("micro", [4, 2])
def test_a_resumed_run_is_held_to_the_same_base(tiny_run, tmp_path, micro):
    same = {
        "steps": 6,
        "anchor_weight": 50.0,
        "anchor_mean_weight": 90.0,
        "micro_batch_size": micro,
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


@pytest.mark.parametrize("tuning", [None, LoRA(rank=2, init="gaussian")], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_cpu_memory_gives_the_same_numbers(tuning, dtype):
    held = {"anchor_weight": 1.0, "anchor_mean_weight": 1.0, "dtype": dtype}
    held |= {"monitors": Monitors(drift_samples=2), "stop_when": NEVER}
    run = embedded(**held | ({"tuning": tuning} if tuning else {}))
    ends = {}
    for where in ("device", "cpu"):
        engine = loop.build(replace(run, base_copy=where))
        metrics = [direct.update(engine, step) for step in range(2)] + [fixed_set.evaluate(engine)]
        ends[where] = metrics, {name: p.detach().clone() for name, p in engine.parameters.items()}
    assert ends["cpu"][0] == ends["device"][0] and ends["cpu"][0][1]["anchor"] > 0
    assert all(torch.equal(ends["cpu"][1][name], p) for name, p in ends["device"][1].items())


def test_a_base_in_cpu_memory_is_brought_block_by_block():
    """Inside a block's forward only that block, and what is outside all blocks, has the base's weights."""
    model = replace(embedded().model, guidance_scale=1.0)  # one forward of the policy a velocity
    engine = loop.build(embedded(anchor_weight=1.0, base_copy="cpu", model=model))
    policy, blocks = engine.model.policy, repeated_blocks(engine.model.policy)
    first = {block: next(p for p in block.parameters() if p.requires_grad) for block in blocks}
    with torch.no_grad():
        for p in engine.parameters.values():
            p.add_(1.0)
    own = {block: p.data_ptr() for block, p in first.items()}
    prompts = [engine.prompts[0].text]
    engine.model.prepare(prompts)
    x = engine.model.noise([torch.Generator()])
    velocity, seen = engine.model.velocity(engine.model.encode(prompts)), []
    for block in blocks:
        block.attn.register_forward_pre_hook(lambda *_: seen.append([p.data_ptr() != own[b] for b, p in first.items()]))
    assert engine.anchor is not None
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in policy.parameters() if id(p) not in inside]
    held = [p.data_ptr() for p in outside]
    with torch.no_grad(), engine.anchor.reference():
        velocity(x, torch.tensor(0.7))
        assert all(p.data_ptr() != where for p, where in zip(outside, held))
    assert len(seen) == len(blocks) > 1
    assert seen == [[i == j for j in range(len(blocks))] for i in range(len(blocks))]
    assert [p.data_ptr() for p in first.values()] == list(own.values()) and [p.data_ptr() for p in outside] == held
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def test_a_forward_that_fails_gives_the_weights_back():
    engine = loop.build(embedded(anchor_weight=1.0, base_copy="cpu"))
    block = repeated_blocks(engine.model.policy)[0]
    own = [p.data_ptr() for p in engine.parameters.values()]

    def fail(*_):
        raise RuntimeError("out of memory")

    block.attn.register_forward_pre_hook(fail)
    prompts = [engine.prompts[0].text]
    engine.model.prepare(prompts)
    velocity = engine.model.velocity(engine.model.encode(prompts))
    assert engine.anchor is not None
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad(), engine.anchor.reference():
        velocity(engine.model.noise([torch.Generator()]), torch.tensor(0.7))
    assert [p.data_ptr() for p in engine.parameters.values()] == own


@pytest.mark.gpu
def test_a_base_in_cpu_memory_leaves_the_gpu_and_comes_back():
    changes = {"anchor_weight": 1.0, "device": "cuda"}
    engines = {where: loop.build(embedded(**changes, base_copy=where)) for where in ("device", "cpu")}
    for engine in engines.values():
        for step in range(2):
            direct.update(engine, step)
    reference = engines["cpu"].anchor.reference.__self__  # type: ignore[union-attr]
    assert all(copy.is_pinned() for copy in reference.copies.values())
    for name, p in engines["device"].parameters.items():
        torch.testing.assert_close(engines["cpu"].parameters[name], p, rtol=1e-5, atol=1e-6)


def test_a_base_in_cpu_memory_is_refused_with_sharded_weights():
    with pytest.raises(UserError, match=r"base_copy cpu with sharded weights: .* sharding replicate"):
        refuse_sharded_base(embedded(base_copy="cpu"), sharded=True)
    refuse_sharded_base(embedded(base_copy="cpu"), sharded=False)
    refuse_sharded_base(embedded(), sharded=True)


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


MEANS = {
    "leaps": {},
    "blocks of draws": {"samples_per_draw": 4},
    "sharing a rollout": {"method": PAIRS, "updates_per_rollout": 2, "checkpoint_every": 4},
    "satisfied skipped": {"method": PAIRS, "skip_satisfied": True},
    "first states": {"method": LeapAlign(pairs_per_rollout=2), "anchor_states": "first", "skip_satisfied": True},
    "chain": {"method": DRaFT(num_last_steps=3)},
    "copies": {"method": DRaFTLV()},
    "sums of unequal length": {"method": AlignProp(), "samples_per_draw": 4},
    "rsm": {"method": RSM(trained_share=0.5)},
}


def pulled_back(run: Run, updates: int = 2) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The drift and the gradients of some updates that begin away from the base."""
    engine, found = loop.build(run), []
    with torch.no_grad():
        for p in engine.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64))
    for step in range(updates):
        drift = direct.update(engine, step)["anchor"]
        found.append((drift, {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}))
    return found


def largest(gradients: dict[str, torch.Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradients.values())


@pytest.mark.parametrize("changes", MEANS.values(), ids=MEANS)
def test_the_mean_is_over_the_batch_whatever_the_micro_batches(tiny_run, tiny_module, changes):
    """1 x 8 = 2 x 4 = 8 x 1; with blocks of draws a micro-batch has 4 samples at most."""
    double = tiny_module.TinyModel(double=True)
    same = {"model": double, "batch_size": 8, "max_grad_norm": 0.0, "steps": 2, "anchor_weight": 3.0} | changes
    held = tiny_run(**same, micro_batch_size=4, anchor_mean_weight=40.0)
    sizes = [size for size in (8, 4, 1) if size <= (held.samples_per_draw or 8)]
    whole, *parts = [pulled_back(replace(held, micro_batch_size=size)) for size in sizes]
    for other in parts:
        for (drift, gradients), (its, others) in zip(whole, other):
            assert drift > 0 and its == pytest.approx(drift, rel=1e-6)  # metrics are float32
            differences = {name: others[name] - g for name, g in gradients.items()}
            assert largest(differences) < 1e-12 * largest(gradients)
    (_, gradients), *_ = whole
    (_, free), *_ = pulled_back(replace(held, anchor_mean_weight=0.0), updates=1)
    assert largest({name: free[name] - g for name, g in gradients.items()}) > 0.01 * largest(gradients)


@pytest.mark.parametrize("tuning", [None, LoRA(rank=2, init="gaussian")], ids=["full", "lora"])
def test_the_mean_over_micro_batches_of_a_real_model(tuning):
    """In float32; the second update is on the rollouts of the first, with other weights."""
    changes = {"anchor_mean_weight": 30.0, "batch_size": 4, "max_grad_norm": 0.0, "method": PAIRS, "warmup_steps": 0}
    changes |= {"updates_per_rollout": 2} | ({"tuning": tuning} if tuning else {})
    whole, parts = (pulled_back(embedded(**changes, micro_batch_size=size)) for size in (4, 1))
    for (drift, gradients), (its, others) in zip(whole, parts):
        assert drift > 0 and its == pytest.approx(drift, rel=1e-4)
        assert largest({name: others[name] - g for name, g in gradients.items()}) < 1e-3 * largest(gradients)


def test_each_differentiated_state_has_one_forward_of_the_base_and_one_more(tiny_run):
    """T = 5: 5 of the rollout and, for each of two micro-batches, 2 to be differentiated again, 2 of the base, and one
    for the nested state's own pull. With pairs, v is known from the rollout: nothing is added."""
    counts = {}
    for name, method in {"leaps": LeapAlign(), "pairs": LeapAlign(pairs_per_rollout=2)}.items():
        for mean in (0.0, 1.0):
            engine = loop.build(tiny_run(method=method, anchor_weight=1.0, anchor_mean_weight=mean))
            calls: list[int] = []
            engine.model.policy.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            direct.update(engine, 0)
            counts[name, mean] = len(calls)
    assert counts == {("leaps", 0.0): 16, ("leaps", 1.0): 20, ("pairs", 0.0): 30, ("pairs", 1.0): 30}

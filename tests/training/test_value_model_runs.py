"""A value model in a run: its gradient reaches the policy, belief, micro-batches, resumption, NaN, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from leapalign.errors import NotFinite, UserError
from leapalign.methods import DRaFTLV, FlowGRPO, LeapAlign
from leapalign.monitors import HeldOut, Monitors
from leapalign.rewards.value_model import ValueModel
from leapalign.run import RewardTerm
from leapalign.training import learning, loop
from leapalign.training.direct import update
from leapalign.training.tracking import read_metrics

SMALL: dict[str, Any] = {"width": 4, "pixels": 8, "train_steps": 3, "train_batch": 8, "parity_window": 8}


def value(module, **changes) -> ValueModel:
    return ValueModel(**({"of": module.Toward(target=0.7), "warmup_updates": 0, "least_parity": 0.0} | SMALL | changes))


def run_of(tiny_run, module, reward=None, **changes):
    term = RewardTerm(reward=reward or value(module), threshold=1.0)
    return tiny_run(**({"model": module.TinyModel(double=True), "rewards": (term,)} | changes))


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.parameters.items()}


def furthest(some, others) -> float:
    return max((some[name] - others[name]).abs().max().item() for name in some)


def test_its_gradient_reaches_the_policy(tiny_run, tiny_module):
    engine = loop.build(run_of(tiny_run, tiny_module))
    update(engine, 0)  # the first update has no parity yet
    before, net = weights(engine), engine.learner.state()
    metrics = update(engine, 1)
    assert metrics["value/believed"] == 1 and metrics["grad_norm"] > 0 and not metrics["skipped"]
    assert furthest(weights(engine), before) > 1e-4
    name = next(name for name in net if name.startswith("network.stem"))
    assert not torch.equal(engine.learner.state()[name], net[name]), "and it learns"


def test_its_gradient_is_that_of_its_score(tiny_run, tiny_module):
    """The policy's gradient is that of a run with the frozen network as an ordinary reward."""
    engine = loop.build(run_of(tiny_run, tiny_module, max_grad_norm=0.0))
    update(engine, 0)
    net, ours = engine.learner, loop.build(run_of(tiny_run, tiny_module))
    for name, p in ours.parameters.items():
        p.data.copy_(engine.parameters[name])
    ours.rewards["value-model"] = lambda images, prompts: net(images, prompts)
    found = []
    for each in (ours, engine):
        each.optimizer.step = lambda each=each: found.append({n: p.grad.clone() for n, p in each.parameters.items()})
        update(each, 1)
    assert furthest(*found) == 0


def test_metrics_are_those_of_the_batch(tiny_run, tiny_module):
    engine = loop.build(run_of(tiny_run, tiny_module))
    metrics = update(engine, 0)
    window = engine.learner.window
    assert metrics["value/truth"] == pytest.approx(window.true.double().mean().item())
    assert metrics["value/error"] == pytest.approx((window.true - window.predicted).abs().double().mean().item())
    assert metrics["reward"] == pytest.approx(window.predicted.double().mean().item())
    assert 0 <= metrics["value/parity"] <= 1 and metrics["value/loss"] > 0


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_not_believed_the_weights_stay_bit_for_bit(tiny_run, tiny_module, anchor):
    run = run_of(tiny_run, tiny_module, value(tiny_module, warmup_updates=3), anchor_weight=anchor, steps=5)
    engine = loop.build(run)
    start, network = weights(engine), engine.learner.state()
    for step in range(3):
        metrics = update(engine, step)
        assert metrics["value/believed"] == 0 and metrics["skipped"] == 1 and metrics["grad_norm"] == 0
    assert all(torch.equal(p, start[name]) for name, p in weights(engine).items())
    assert all(torch.equal(engine.ema.shadow[name], start[name]) for name in start)
    assert not engine.optimizer.state
    assert not torch.equal(engine.learner.state()["network.head.0.weight"], network["network.head.0.weight"])
    metrics = update(engine, 3)
    assert metrics["value/believed"] == 1 and furthest(weights(engine), start) > 1e-4


def test_not_believed_after_it_was_nothing_moves_either(tiny_run, tiny_module):
    """AdamW has moments by then, which would move the weights without any gradient."""
    engine = loop.build(run_of(tiny_run, tiny_module))
    for step in range(2):
        update(engine, step)
    assert engine.learner.believed and engine.optimizer.state
    engine.learner.config = replace(engine.learner.config, least_parity=1.0)
    engine.learner.window = replace(engine.learner.window, predicted=-engine.learner.window.true)
    before = weights(engine)
    assert update(engine, 2)["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in weights(engine).items())


def test_beside_another_reward_it_is_left_out_while_it_is_not_believed(tiny_run, tiny_module):
    other = RewardTerm(reward=tiny_module.TinyReward(), threshold=2.0)
    mine = RewardTerm(reward=value(tiny_module, warmup_updates=9), threshold=1.0, weight=3.0)
    alone, both = (loop.build(run_of(tiny_run, tiny_module, rewards=r)) for r in ((other,), (other, mine)))
    for step in range(2):
        assert update(alone, step)["skipped"] == update(both, step)["skipped"] == 0
    assert furthest(weights(alone), weights(both)) == 0


@pytest.mark.parametrize("method", [LeapAlign(), DRaFTLV()], ids=lambda method: method.name)
def test_micro_batches_and_chunks_change_nothing(tiny_run, tiny_module, method, tmp_path):
    ends = []
    for micro, chunk in ((4, 0), (2, 1), (1, 0)):
        sizes = {"micro_batch_size": micro, "reward_chunk": chunk, "out": str(tmp_path / f"{micro}")}
        engine = loop.build(run_of(tiny_run, tiny_module, method=method, **sizes))
        start = weights(engine)
        for step in range(3):
            update(engine, step)
        ends.append((weights(engine), engine.learner))
    for found, learner in ends[1:]:
        assert furthest(found, ends[0][0]) < 1e-4 < 10 * 1e-4 < furthest(found, start)
        assert torch.equal(learner.window.prompt, ends[0][1].window.prompt)
        assert torch.allclose(learner.window.true, ends[0][1].window.true, atol=1e-5)


def test_a_resumed_run_goes_on_bit_for_bit(tiny_run, tiny_module, tmp_path):
    whole = loop.train(run_of(tiny_run, tiny_module, out=str(tmp_path / "whole")))
    short = run_of(tiny_run, tiny_module, out=str(tmp_path / "parts"), steps=2)
    loop.train(short)
    state = (tmp_path / "parts" / "checkpoints" / "step-000002").iterdir()
    assert "learnt.safetensors" in {path.name for path in state}
    parts = loop.train(replace(short, steps=4), resume=True)
    assert all(torch.equal(p, parts.engine.parameters[name]) for name, p in whole.engine.parameters.items())
    ends = [result.engine.learner.state() for result in (whole, parts)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    timeless = [[{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(r.out)] for r in (whole, parts)]
    assert timeless[0] == timeless[1]


def test_a_checkpoint_without_its_file_is_damaged(tiny_run, tiny_module):
    run = run_of(tiny_run, tiny_module, steps=2)
    out = loop.train(run).out
    (out / "checkpoints" / "step-000002" / "learnt.safetensors").unlink()
    with pytest.raises(UserError, match="damaged"):
        loop.train(replace(run, steps=4), resume=True)


def test_a_true_reward_of_nan_stops_with_the_prompt(tiny_run, tiny_module):
    reward = value(tiny_module, of=tiny_module.TinyReward(spoil="blue and more"))
    engine = loop.build(run_of(tiny_run, tiny_module, reward))
    start = weights(engine)
    with pytest.raises(NotFinite, match=r"the reward that value-model learns is nan for the prompt 'blue and more'"):
        for step in range(3):
            update(engine, step)
    learning.forget(engine)
    assert not engine.fresh and not engine.learner.seen and start


def refusals(module):
    held_out = Monitors(held_out=(HeldOut(reward=value(module)),))
    term = RewardTerm(reward=value(module), threshold=1.0)
    return {
        "needs no gradient": {"method": FlowGRPO(), "samples_per_prompt": 2},
        "use updates_per_rollout 1": {"updates_per_rollout": 2},
        "expected one": {"rewards": (term, term)},
        "leave device empty": {"rewards": (replace(term, device="cpu"),)},
        "hold out the reward itself": {"monitors": held_out, "rewards": (replace(term, reward=module.TinyReward()),)},
    }


@pytest.mark.parametrize(
    "words",
    [
        *("needs no gradient", "use updates_per_rollout 1", "expected one", "leave device empty"),
        "hold out the reward itself",
    ],
)
def test_what_a_value_model_cannot_have_is_refused(tiny_run, tiny_module, words):
    with pytest.raises(UserError, match=words):
        loop.build(run_of(tiny_run, tiny_module, **refusals(tiny_module)[words]))

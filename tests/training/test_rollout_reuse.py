"""Several updates on one rollout: kept values, gradients of the new weights, prompts, resume and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.methods import LeapAlign, ReFL
from leapalign.methods.leapalign import LeapSets
from leapalign.training import batches, direct, loop
from leapalign.training.tracking import read_metrics
from small_problem import Net, grid, noise, objective

PAIRS = LeapAlign(pairs_per_rollout=2, step_draws="stratified")
SETS = [LeapSets(torch.tensor(sets)) for sets in ([[[8], [3]], [[6], [5]]], [[[7], [2]], [[5], [1]]])]


def test_a_second_update_differentiates_the_new_weights_at_the_old_states():
    """Second derivation: dL/dtheta of the new weights, with states, connectors, weights and reward of the rollout."""
    net, x, sigmas = Net(), noise(), grid(8)
    method = LeapAlign(pairs_per_rollout=2, nested_scale=0.4)
    states = {t: rollout(net, x, sigmas, stop=t).detach() for t in range(9)}
    old = {t: net(states[t], sigmas[t]).detach() for t in range(1, 9)}
    _, second = method.surrogates(net, x, sigmas, SETS)
    grad = objective(second).grad
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.3)
    for (k,), (j,) in SETS[1].steps.tolist():
        d_j = (states[j] - (states[k] - (sigmas[k] - sigmas[j]) * old[k])).abs().mean(-1)
        d_0 = (states[0] - (states[j] - sigmas[j] * old[j])).abs().mean(-1)
        x_j = states[k] - (sigmas[k] - sigmas[j]) * net(states[k], sigmas[k])
        x_j = x_j + (states[j] - x_j).detach()
        x_0 = x_j - sigmas[j] * net(0.4 * x_j + (0.6 * x_j).detach(), sigmas[j])
        weight = 1 / (d_j.clamp(min=0.1) + d_0.clamp(min=0.1))
        share = (weight / second.weight / 2)[:, None]
        (share * grad * x_0).sum().backward()
    expected = net.grads()
    second.backward(grad)
    torch.testing.assert_close(net.grads(), expected, rtol=1e-10, atol=1e-13)
    assert expected.abs().max() > 1e-3


def run_of(tiny_run, **changes):
    return tiny_run(**({"method": PAIRS, "updates_per_rollout": 2, "steps": 8, "checkpoint_every": 4} | changes))


@pytest.mark.parametrize("anchor", [0.0, 2.0])
def test_micro_batches_change_nothing(tiny_run, tiny_module, tmp_path, anchor):
    same = {"model": tiny_module.TinyModel(double=True), "batch_size": 8, "anchor_weight": anchor}
    runs = [run_of(tiny_run, **same, micro_batch_size=m, out=str(tmp_path / str(m))) for m in (8, 2)]
    whole, parts = (loop.train(run).engine.parameters for run in runs)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-12
    losses = [[row["loss"] for row in read_metrics(Path(run.out)) if "loss" in row] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


def test_one_rollout_and_one_reward_serve_each_two_updates(tiny_run):
    engine = loop.build(run_of(tiny_run))
    scored, found = [], []
    for name, reward in engine.rewards.items():
        engine.rewards[name] = lambda images, texts, r=reward: scored.append(len(images)) or r(images, texts)
    for step in range(4):
        found.append(direct.update(engine, step))
    assert len(scored) == 2 * 2  # 2 rollouts of 2 micro-batches
    assert found[0]["reward"] == found[1]["reward"] != found[2]["reward"]
    assert found[0]["staleness"] < 1e-6 < found[1]["staleness"]
    assert (found[0]["k"], found[0]["j"]) != (found[1]["k"], found[1]["j"])  # other pairs


def test_no_prompt_is_left_out(tiny_run):
    run = run_of(tiny_run)
    prompts = run.prompts.load()
    shown = [m.prompts for step in range(0, 8, 2) for m in batches.micro_batches(run, prompts, step)]
    once = replace(run, updates_per_rollout=1)
    assert shown == [m.prompts for step in range(4) for m in batches.micro_batches(once, prompts, step)]


def test_a_resumed_run_is_the_same(tiny_run, tmp_path):
    whole = loop.train(run_of(tiny_run, out=str(tmp_path / "whole"))).engine.parameters
    part = run_of(tiny_run, out=str(tmp_path / "part"))
    loop.train(replace(part, steps=4))
    resumed = loop.train(part, resume=True).engine.parameters
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_batch_that_is_left_out_is_not_used_again(tiny_run, tiny_module):
    reward = tiny_module.TinyReward(spoil="red")
    term = replace(tiny_run().rewards[0], reward=reward)
    result = loop.train(run_of(tiny_run, rewards=(term,), max_nonfinite_batches=8, micro_batch_size=4))
    rows = [row for row in read_metrics(Path(result.out)) if row["step"]]
    assert any(row.get("nonfinite_batch") for row in rows)
    assert all(row["skipped"] for row in rows if row.get("nonfinite_batch"))


def test_a_run_that_left_a_batch_out_resumes_at_the_same_prompts(tiny_run, tiny_module, tmp_path):
    term = replace(tiny_run().rewards[0], reward=tiny_module.TinyReward(spoil="red"))
    same = {"rewards": (term,), "max_nonfinite_batches": 20, "batch_size": 1, "micro_batch_size": 1}
    same |= {"steps": 20, "anchor_weight": 1.0}
    whole = loop.train(run_of(tiny_run, **same, out=str(tmp_path / "whole"))).engine.parameters
    part = run_of(tiny_run, **same, out=str(tmp_path / "part"))
    loop.train(replace(part, steps=12))
    assert any(row.get("nonfinite_batch") for row in read_metrics(Path(part.out)))
    resumed = loop.train(part, resume=True).engine.parameters
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_refusals(tiny_run):
    with pytest.raises(UserError, match="refl differentiates inside its rollout"):
        loop.build(run_of(tiny_run, method=ReFL()))
    with pytest.raises(UserError, match="steps 7 is not a multiple of updates_per_rollout 2"):
        run_of(tiny_run, steps=7)
    with pytest.raises(UserError, match="checkpoint_every 3 is not a multiple"):
        run_of(tiny_run, checkpoint_every=3)

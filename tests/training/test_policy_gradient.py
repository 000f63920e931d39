"""The loop of policy-gradient methods: groups, accumulation, several updates a rollout, the ratio, resume, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from leapalign.errors import NotFinite, RunStopped, UserError
from leapalign.flow.sde import FlowSDE
from leapalign.methods import AWM, DanceGRPO, DiffusionNFT, FlowDPPO, FlowGRPO, LeapAlign, MixGRPO
from leapalign.methods.policy_gradient import Normalisation, Term
from leapalign.rewards import JPEGSize
from leapalign.run import RewardTerm
from leapalign.training import batches, loop, policy_gradient
from leapalign.training.policy_gradient import method_of
from leapalign.training.tracking import read_metrics

METHODS = [FlowGRPO(), FlowGRPO(sampler="cps", noise_level=0.8), FlowGRPO(window=2, same_noise=True)]
METHODS += [
    FlowGRPO(guard=True, kl_weight=0),
    DanceGRPO(),
    MixGRPO(window=2, shift_every=1, tail_share=0.5),
    FlowDPPO(),
    AWM(num_times=2),
]
NFT = DiffusionNFT(decay_growth=0.2)


def ids(method) -> str:
    return f"{method.name}-{method.sampler}-{method.window}-{method.guard}" if type(method) is FlowGRPO else method.name


every_method = pytest.mark.parametrize("method", METHODS, ids=ids)
with_nft = pytest.mark.parametrize("method", [*METHODS, NFT], ids=ids)


def run_of(tiny_run, tiny_module, **changes):
    same = {"method": FlowGRPO(), "model": tiny_module.TinyModel(double=True), "batch_size": 8, "samples_per_prompt": 4}
    return tiny_run(**({"micro_batch_size": 4, "steps": 4, "checkpoint_every": 2} | same | changes))


def test_a_group_shares_its_prompt_and_prompts_are_read_in_order(tiny_run, tiny_module):
    run = run_of(tiny_run, tiny_module, micro_batch_size=2)
    prompts = run.prompts.load()
    texts = read(run, prompts)
    groups = [texts[i : i + 4] for i in range(0, len(texts), 4)]
    assert all(len(set(group)) == 1 for group in groups)
    each = replace(run, samples_per_prompt=1, batch_size=2, micro_batch_size=2)
    assert [group[0] for group in groups] == read(each, prompts)
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            used = batches.prompts_used(replace(run, steps=3), prompts, rank=rank, ranks=ranks)
            assert set(read(run, prompts, rank, ranks)) <= set(used)


def read(run, prompts, *ranks) -> list[str]:
    """The prompts of three updates' samples."""
    micros = (micro for step in range(3) for micro in batches.micro_batches(run, prompts, step, *ranks))
    return [text for micro in micros for text in micro.prompts]


@with_nft
def test_micro_batches_change_nothing(tiny_run, tiny_module, tmp_path, method):
    same = {"method": method, "updates_per_rollout": 2, "evaluate_every": 0, "checkpoint_every": 4}
    same |= {"updates_per_rollout": 1, "ema_decay": 0.0} if method is NFT else {}
    runs = [
        run_of(tiny_run, tiny_module, **same, micro_batch_size=m, reward_chunk=c, out=str(tmp_path / str(m)))
        for m, c in ((4, 0), (1, 0))
    ]
    whole, parts = (loop.train(run).engine.parameters for run in runs)
    start = loop.build(runs[0]).parameters
    assert max((whole[name] - start[name]).abs().max().item() for name in whole) > 1e-4
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-10


def test_the_first_gradient_is_minus_the_advantage_times_that_of_the_log_probability(tiny_run, tiny_module):
    """Second derivation: at rho = 1 the loss's gradient is -mean A d logp, whatever the clip range."""
    engine = loop.build(run_of(tiny_run, tiny_module, method=FlowGRPO(kl_weight=0), max_grad_norm=0.0))
    policy_gradient.roll_out_batch(engine, 0)
    total = torch.zeros((), dtype=torch.float64)
    for rolled_out in engine.rolled_out:
        for kept in rolled_out.steps:
            v = engine.model.velocity(engine.model.encode(rolled_out.micro.prompts))(kept.x, kept.sigma)
            d, s = kept.sigma_next - kept.sigma, 0.7 * (kept.sigma / (1 - kept.sigma.clamp(max=0.8))).sqrt()
            at = [t.view(-1, 1, 1, 1) for t in (kept.sigma, d, s)]
            mean = kept.x + at[1] * (v + at[2] ** 2 / (2 * at[0]) * (kept.x + (1 - at[0]) * v))
            normal = torch.distributions.Normal(mean, at[2] * (-at[1]).sqrt())
            logp = normal.log_prob(kept.x_next).flatten(1).mean(1)
            torch.testing.assert_close(logp.detach(), kept.log_prob, rtol=1e-12, atol=1e-12)
            total = total - (rolled_out.advantages * logp).sum() / (8 * 5)
    expected = torch.autograd.grad(total, list(engine.parameters.values()))
    policy_gradient.update(engine, 0)
    for p, grad in zip(engine.parameters.values(), expected):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-13)
    assert max(float(grad.abs().max()) for grad in expected) > 1e-4


def test_advantages_are_of_whole_groups_and_several_rewards_are_normalised_apart(tiny_run, tiny_module):
    terms = (
        RewardTerm(reward=tiny_module.TinyReward(), threshold=2.0, weight=0.5),
        RewardTerm(reward=tiny_module.Toward(), threshold=2.0, weight=2.0),  # has no gradient
    )
    engine = loop.build(run_of(tiny_run, tiny_module, rewards=terms, micro_batch_size=2))
    policy_gradient.roll_out_batch(engine, 0)
    given = torch.cat([rolled_out.advantages for rolled_out in engine.rolled_out])
    expected = torch.zeros(8, dtype=torch.float64)
    for weight, reward in zip((0.5, 2.0), engine.rolled_out[0].rewards.values()):
        centred = reward.view(2, 4) - reward.view(2, 4).mean(1, keepdim=True)
        expected += weight * (centred / (reward.std(correction=0) + 1e-4)).flatten()
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    metrics = policy_gradient.update(engine, 0)
    assert {"reward", "reward/tiny-reward", "reward/toward", "ratio_deviation", "clipped", "kl"} <= metrics.keys()


def test_same_noise_within_a_group(tiny_run, tiny_module):
    engine = loop.build(run_of(tiny_run, tiny_module, method=FlowGRPO(same_noise=True)))
    noises = torch.cat([policy_gradient.noise(engine, micro) for micro in engine.micro_batches(0)]).unflatten(0, (2, 4))
    assert torch.equal(noises, noises[:, :1].expand_as(noises)) and not torch.equal(noises[0], noises[1])
    other = loop.build(run_of(tiny_run, tiny_module))
    first = next(other.micro_batches(0))
    assert not torch.equal(policy_gradient.noise(other, first)[0], policy_gradient.noise(other, first)[1])


@every_method
def test_the_ratio_is_1_before_the_first_update_and_not_after(tiny_run, tiny_module, method):
    engine = loop.build(run_of(tiny_run, tiny_module, method=method, updates_per_rollout=2))
    first, second = (policy_gradient.update(engine, step) for step in range(2))
    assert first["ratio_deviation"] < 1e-12 < 1e-6 < second["ratio_deviation"]
    assert first["reward"] == second["reward"] and not engine.rolled_out


def test_a_wrong_ratio_stops_the_run(tiny_run, tiny_module, monkeypatch):
    """A velocity that changes with gradient on, as dropout would."""
    engine = loop.build(run_of(tiny_run, tiny_module))
    plain = type(engine.model).velocity

    def noisy(self, conditioning):
        v = plain(self, conditioning)
        return lambda x, sigma: v(x, sigma) * (1.5 if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(type(engine.model), "velocity", noisy)
    before = {name: p.clone() for name, p in engine.parameters.items()}
    with pytest.raises(RunStopped, match=r"step 1: the probability ratio is off 1 by .* for the prompt '"):
        policy_gradient.update(engine, 0)
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())


def test_a_nan_reward_names_its_prompt(tiny_run, tiny_module):
    term = RewardTerm(reward=tiny_module.TinyReward(spoil="red"), threshold=2.0)
    with pytest.raises(NotFinite, match="the reward tiny-reward is nan for the prompt 'red'"):
        loop.train(run_of(tiny_run, tiny_module, rewards=(term,), self_checks=False))


def test_a_batch_that_is_left_out_is_rolled_out_anew(tiny_run, tiny_module):
    term = RewardTerm(reward=tiny_module.TinyReward(spoil="red"), threshold=2.0)
    changes = {"rewards": (term,), "self_checks": False, "max_nonfinite_batches": 8, "updates_per_rollout": 2}
    result = loop.train(run_of(tiny_run, tiny_module, **changes, steps=8))
    rows = [row for row in read_metrics(Path(result.out)) if row["step"]]
    assert any(row.get("nonfinite_batch") for row in rows) and any(not row["skipped"] for row in rows)


def test_an_update_without_advantages_is_skipped(tiny_run, tiny_module):
    terms = (RewardTerm(reward=JPEGSize(quality=1), threshold=2.0, weight=0.0),)
    engine = loop.build(run_of(tiny_run, tiny_module, method=FlowGRPO(kl_weight=0), rewards=terms))
    metrics = policy_gradient.update(engine, 0)
    assert metrics["skipped"] == 1 and metrics["equal_groups"] < 1 and metrics["loss"] == 0
    held = loop.build(run_of(tiny_run, tiny_module, method=FlowGRPO(kl_weight=1.0), rewards=terms))
    assert policy_gradient.update(held, 0)["skipped"] == 0  # the divergence is trained all the same


def test_the_divergence_pulls_towards_the_base(tiny_run, tiny_module):
    """Its gradient: beta / (2 s^2) d mean_d (mean - mean_base)^2, by autograd on the formula."""
    engine = loop.build(run_of(tiny_run, tiny_module, method=FlowGRPO(kl_weight=3.0)))
    policy_gradient.update(engine, 0)
    policy_gradient.update(engine, 1)
    policy_gradient.roll_out_batch(engine, 2)
    rolled_out = engine.rolled_out[0]
    kept, velocity = rolled_out.steps[1], rolled_out.velocity
    term = method_of(engine).loss(velocity, policy_gradient.base_of(engine, velocity), kept, torch.zeros(4))
    kernel = FlowSDE(noise_level=0.7, largest=engine.sigmas[-2])
    assert engine.base
    with engine.base(), torch.no_grad():
        of_base = kernel(kept.x, velocity(kept.x, kept.sigma), kept.sigma, kept.sigma_next)
    new = kernel(kept.x, velocity(kept.x, kept.sigma), kept.sigma, kept.sigma_next)
    s = new.scale.view(-1, 1, 1, 1)
    expected = 3.0 * ((new.mean - of_base.mean) ** 2 / (2 * s**2)).flatten(1).mean(1)
    torch.testing.assert_close(term.loss, expected, rtol=1e-12, atol=1e-15)
    assert float(term.metrics["kl"].min()) > 1e-9


@with_nft
def test_a_resumed_run_is_the_same(tiny_run, tiny_module, tmp_path, method):
    changes = {"method": method, "updates_per_rollout": 2, "steps": 8, "checkpoint_every": 4}
    changes |= {"updates_per_rollout": 1, "ema_decay": 0.0} if method is NFT else {}
    whole = loop.train(run_of(tiny_run, tiny_module, **changes, out=str(tmp_path / "whole")))
    part = run_of(tiny_run, tiny_module, **changes, out=str(tmp_path / "part"))
    loop.train(replace(part, steps=4))
    resumed = loop.train(part, resume=True)
    for name, p in whole.engine.parameters.items():
        assert torch.equal(p, resumed.engine.parameters[name])
        assert torch.equal(whole.engine.ema.shadow[name], resumed.engine.ema.shadow[name])
    rows = [[r for r in read_metrics(Path(result.out))] for result in (whole, resumed)]
    assert [r["reward"] for r in rows[0] if "reward" in r] == [r["reward"] for r in rows[1] if "reward" in r]


def test_nft_samples_with_its_average(tiny_run, tiny_module):
    """Second derivation of three updates: old <- d old + (1 - d) new, and rollouts by old."""
    engine = loop.build(run_of(tiny_run, tiny_module, method=NFT, ema_decay=0.0))
    for step in range(3):
        old = {name: p.clone() for name, p in engine.ema.shadow.items()}
        policy_gradient.update(engine, step)
        d = min(0.2 * (step + 1), 0.5)
        for name, p in engine.parameters.items():
            expected = d * old[name] + (1 - d) * p
            torch.testing.assert_close(engine.ema.shadow[name], expected, rtol=1e-12, atol=1e-15)
    live = {name: p.clone() for name, p in engine.parameters.items()}
    policy_gradient.roll_out_batch(engine, 3)
    rolled_out = engine.rolled_out[0]
    kept = rolled_out.steps[0]
    with engine.ema.applied(), torch.no_grad():
        torch.testing.assert_close(kept.v_old, rolled_out.velocity(kept.x, kept.sigma), rtol=0, atol=1e-14)
    assert all(torch.equal(p, live[name]) for name, p in engine.parameters.items())
    assert not torch.allclose(kept.v_old, rolled_out.velocity(kept.x, kept.sigma), atol=1e-6)
    with pytest.raises(UserError, match="averages the weights its own way"):
        loop.build(run_of(tiny_run, tiny_module, method=NFT))


def test_refusals(tiny_run, tiny_module):
    def built(**changes):
        return loop.build(run_of(tiny_run, tiny_module, **changes))

    with pytest.raises(UserError, match="compares samples of one prompt, and samples_per_prompt is 1"):
        built(samples_per_prompt=1)
    with pytest.raises(UserError, match=r"samples_per_prompt 3, so a group .*use batch_size 6 or 9"):
        built(samples_per_prompt=3)
    with pytest.raises(UserError, match="batch_size 8 cannot be divided into 4 updates of whole micro-batches of 4"):
        built(updates_per_rollout=4, checkpoint_every=4)
    with pytest.raises(UserError, match="anchor_weight is for direct-gradient methods"):
        built(anchor_weight=1.0)
    with pytest.raises(UserError, match="uses no gradient of the reward"):
        built(rewards=(replace(tiny_run().rewards[0], unit_gradient=True),))
    with pytest.raises(UserError, match="the reward toward has no gradient"):
        built(method=LeapAlign(), rewards=(RewardTerm(reward=tiny_module.Toward(), threshold=2.0),))
    with pytest.raises(UserError, match="guard corrects a Gaussian log-probability, which cps lacks"):
        FlowGRPO(guard=True, sampler="cps")
    with pytest.raises(UserError, match="a window of 4 steps does not fit"):
        policy_gradient.update(built(method=FlowGRPO(window=4)), 0)


@dataclass(frozen=True, kw_only=True)
class Mine:
    """A user's own method of this kind, by composition."""

    name: ClassVar[str] = "mine"
    same_forwards: ClassVar[bool] = True
    normalisation: ClassVar[Normalisation] = Normalisation()
    same_noise: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    advantage_limit: ClassVar[float] = 5.0

    def draw(self, num_steps, rng, samples):
        return AWM(num_times=2).draw(num_steps, rng, samples)

    def roll_out(self, velocity, x, sigmas, draws):
        return AWM(num_times=2).roll_out(velocity, x, sigmas, draws)

    def loss(self, velocity, base, step, advantages):
        error = (velocity(step.x, step.sigma) - step.target).square().flatten(1).mean(1)
        return Term(loss=advantages.clamp(min=0).to(error) * error)  # matches good samples only


def test_a_method_of_the_users_own(tiny_run, tiny_module):
    metrics = policy_gradient.update(loop.build(run_of(tiny_run, tiny_module, method=Mine())), 0)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0 and "ratio_deviation" not in metrics

"""The loop: equal results for equal batches, skipped updates, hard stops, and the numbers it writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from leapalign.errors import RunStopped, UserError
from leapalign.methods.alignprop import AlignProp, AlignPropDraws
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.run import RewardTerm
from leapalign.seeds import generator
from leapalign.training import batches, direct, fixed_set, loop
from leapalign.training.metrics import BY_STEPS
from leapalign.training.tracking import read_metrics


def weights_after(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loop.train(run).engine.parameters.items()}


PAIRS = LeapAlign(pairs_per_rollout=2, step_draws="stratified")


FLOWBP = [FlowBPSparse(step_draws="per-sample"), FlowBPBridge(), FlowBPLagrange()]


@pytest.mark.parametrize("method", [LeapAlign(), PAIRS, DRaFTLV(), ReFL(), *FLOWBP], ids=lambda m: m.name)
@pytest.mark.parametrize("share", [0, 4])
@pytest.mark.parametrize("anchor", [0.0, 3.0])
def test_accumulation_changes_nothing(tiny_run, tiny_module, tmp_path, method, share, anchor):
    """1 x 8 = 2 x 4 = 8 x 1, with one draw a batch and with two."""
    same = {"model": tiny_module.TinyModel(double=True), "method": method, "batch_size": 8, "samples_per_draw": share}
    same["anchor_weight"] = anchor
    micros = [8, 4, 1] if share == 0 else [4, 2, 1]
    runs = [tiny_run(**same, micro_batch_size=m, out=str(tmp_path / str(m)), steps=3) for m in micros]
    whole, *parts = [weights_after(run) for run in runs]
    moved = max((whole[n] - p).abs().max().item() for n, p in loop.build(runs[0]).parameters.items())
    assert moved > 1e-3
    for other in parts:
        assert max((whole[n] - other[n]).abs().max().item() for n in whole) < 1e-12
    losses = [[m["loss"] for m in read_metrics(Path(run.out))[1:]] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == pytest.approx(losses[0], rel=1e-12)
    tables = [[m.get(BY_STEPS, {}) for m in read_metrics(Path(run.out))[1:]] for run in runs]
    for other in tables[1:]:
        for ours, theirs in zip(tables[0], other):
            assert ours.keys() == theirs.keys() and bool(ours) == isinstance(method, LeapAlign)
            assert all(theirs[name] == pytest.approx(column, rel=1e-3) for name, column in ours.items())


def test_the_table_by_steps_has_the_means_of_the_samples(tiny_run, tiny_module):
    """Against the metrics, which are means over all samples, and against the draws."""
    run = tiny_run(method=PAIRS, batch_size=8, micro_batch_size=2, model=tiny_module.TinyModel(double=True))
    engine = loop.build(run)
    drawn = [
        engine.run.method.draw(
            run.num_sampling_steps, batches.draw_generator(run, micro), direct.samples_of(engine, micro)
        )
        for micro in engine.micro_batches(0)
    ]
    pairs = torch.cat([draws.steps for draws in drawn], dim=2).transpose(1, 2).flatten(0, 1).tolist()  # [2 * 8, 2]
    metrics = direct.update(engine, 0)
    table = metrics[BY_STEPS]
    assert list(table)[:3] == ["k", "j", "samples"]
    rows = list(zip(table["k"], table["j"], table["samples"]))
    assert rows == sorted((k, j, pairs.count([k, j])) for k, j in {tuple(pair) for pair in pairs})
    for name in ("d_j", "d_0", "weight", "grad_single/k", "grad_nested/k", "grad_single/j"):
        mean = sum(n * value for n, value in zip(table["samples"], table[name])) / sum(table["samples"])
        assert mean == pytest.approx(metrics[name], rel=1e-3) and mean > 0


def test_samples_above_the_threshold_have_no_gradient_by_steps(tiny_run):
    engine = loop.build(tiny_run(rewards=(replace(tiny_run().rewards[0], threshold=-5.0),)))
    metrics = direct.update(engine, 0)
    assert metrics["skipped"] and metrics["weight"] > 0 == metrics["grad_single/k"] == metrics["grad_nested/k"]


def test_the_learning_rate_rises_in_a_straight_line_and_stays(tiny_run):
    """AdamW's first update is rate * sign(gradient), so its size shows the rate."""
    engines = [loop.build(tiny_run(warmup_steps=n, weight_decay=0.0)) for n in (0, 4)]
    changes = []
    for engine in engines:
        before = {name: p.detach().clone() for name, p in engine.parameters.items()}
        direct.update(engine, 0)
        changes.append(torch.cat([(p.detach() - before[name]).flatten() for name, p in engine.parameters.items()]))
    torch.testing.assert_close(changes[1], changes[0] / 4, rtol=1e-3, atol=1e-8)
    rates = []
    for step in range(6):
        direct.update(engines[1], step)
        rates.append(engines[1].optimizer.param_groups[0]["lr"] / engines[1].run.learning_rate)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_falls_to_a_tenth_and_stays(tiny_run):
    run = tiny_run(warmup_steps=2, decay_steps=8, learning_rate=1.0)
    rates = [direct.learning_rate(run, step) for step in range(14)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.55)
    assert rates[2:11] == sorted(rates[2:11], reverse=True) and rates[10:] == pytest.approx([0.1] * 4)
    assert [direct.learning_rate(tiny_run(learning_rate=1.0), step) for step in (0, 99)] == [1.0, 1.0]


def test_the_gradient_is_that_of_the_mean_loss(tiny_run, tiny_module):
    """Second derivation of one update: DRaFT-1 by plain autograd over the whole batch, without the loop's parts."""
    from leapalign.methods.draft import DRaFT

    run = tiny_run(method=DRaFT(), model=tiny_module.TinyModel(double=True), max_grad_norm=0.0, ema_decay=0.0)
    engine = loop.build(run)
    direct.update(engine, 0)
    got = {name: p.grad.clone() for name, p in engine.parameters.items()}  # type: ignore[union-attr]

    model = run.model.load("cpu", "float32")
    texts = [engine.prompts[batches.prompt_index(run.seed, i, len(engine.prompts))].text for i in range(4)]
    model.prepare(texts)
    x = model.noise([generator(run.seed, step=0, sample=i, purpose="noise") for i in range(4)])
    velocity, T = model.velocity(model.encode(texts)), run.num_sampling_steps
    for t in range(T, 0, -1):
        x = x.detach() - velocity(x.detach(), torch.tensor(t / T, dtype=torch.float64)) / T
    reward = run.rewards[0].reward.load("cpu", "float32")(model.decode(x), texts)
    (run.rewards[0].threshold - reward).mean().backward()
    for name, p in model.policy.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-11, atol=1e-14)


def test_clipping_limits_the_gradient(tiny_run, tiny_module):
    run = tiny_run(model=tiny_module.TinyModel(double=True), max_grad_norm=1e-3)
    engine = loop.build(run)
    metrics = direct.update(engine, 0)
    squares = sum(float(p.grad.square().sum()) for p in engine.parameters.values() if p.grad is not None)
    assert metrics["grad_norm"] > 1e-3
    assert squares**0.5 == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_graph_of_inputs_gives_the_same_weights(tiny_run, tmp_path, micro_batches):
    """Bit for bit, with several micro-batches too: under both, gradients of leaps are added to .grad one by one."""
    size = tiny_run().batch_size
    same = {"steps": 2, "batch_size": size, "micro_batch_size": size // micro_batches}
    everything = weights_after(tiny_run(out=str(tmp_path / "all"), **same))
    inputs = weights_after(tiny_run(out=str(tmp_path / "inputs"), graph="inputs", **same))
    for name, value in everything.items():
        assert torch.equal(value, inputs[name])


@pytest.mark.parametrize("graph", ["all", "inputs"])
def test_gradients_are_held_once_and_go_with_their_update(tiny_run, graph):
    """Each of two leaps adds to .grad by itself; AdamW takes a weight at a time; the evaluation finds no gradient."""
    run = tiny_run(method=LeapAlign(), graph=graph, micro_batch_size=tiny_run().batch_size)
    engine, added = loop.build(run), []
    weight = next(iter(engine.parameters.values()))
    weight.register_post_accumulate_grad_hook(lambda p: added.append(p.grad.clone()))
    direct.update(engine, 0)
    assert len(added) == 2 and not torch.equal(*added)
    assert engine.optimizer.defaults["foreach"] is False
    assert all(p.grad is None for p in loop.train(run).engine.parameters.values())


def test_blocks_need_a_model_that_has_them(tiny_run):
    with pytest.raises(UserError, match="Sequential cannot checkpoint its blocks; use graph=inputs"):
        loop.train(tiny_run(graph="blocks"))


def test_samples_above_the_threshold_are_skipped_and_counted(tiny_run, tiny_module, capsys):
    run = tiny_run(rewards=(RewardTerm(reward=tiny_module.TinyReward(), threshold=-1.0),), weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in loop.build(run).parameters.items()}
    result = loop.train(run)
    lines = read_metrics(result.out)[1:]
    assert result.summary["skipped"] == 4 and [m["skipped"] for m in lines] == [1] * 4
    assert all(m["fraction_above_threshold"] == 1 and m["grad_norm"] == 0 for m in lines)
    for name, p in result.engine.parameters.items():  # neither weight decay nor average moved anything
        assert torch.equal(p, before[name]) and torch.equal(result.engine.ema.shadow[name], before[name])
    assert capsys.readouterr().err.count("100% of the batch lies above the threshold") == 1


@dataclass(frozen=True, kw_only=True)
class EveryOther:
    """AlignProp whose depth is 0 at first and then 2: a draw without a differentiated step."""

    name: ClassVar[str] = "every-other"

    def draw(self, num_steps, rng, noise):
        return AlignPropDraws(0 if rng.initial_seed() in FIRST else 2)

    def __call__(self, velocity, x, sigmas, draws):
        return AlignProp()(velocity, x, sigmas, draws)


FIRST: set[int] = set()


def test_a_draw_without_gradient_skips_only_itself(tiny_run):
    run = tiny_run(method=EveryOther(), steps=2)
    FIRST.add(generator(run.seed, step=0, sample=0, purpose="draw").initial_seed())
    result = loop.train(run)
    assert [m["skipped"] for m in read_metrics(result.out)[1:]] == [1, 0]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"spoil": "five"}, "the reward tiny-reward is nan for the prompt 'five'"),
        ({"spoil_gradient": "red"}, "the reward's gradient at the latent is nan for the prompt 'red'"),
    ],
)
def test_nan_stops_the_run_and_names_step_prompt_and_tensor(tiny_run, tiny_module, flaw, message):
    run = tiny_run(steps=20, checkpoint_every=1, evaluate_every=0, keep_checkpoints=30, self_checks=False)
    bad = replace(run, rewards=(RewardTerm(reward=tiny_module.TinyReward(**flaw), threshold=2.0),))
    prompts = bad.prompts.load()
    text = next(iter(flaw.values()))
    step = next(s for s in range(20) if any(text in m.prompts for m in batches.micro_batches(bad, prompts, s)))
    with pytest.raises(RunStopped, match=message) as stopped:
        loop.train(bad)
    assert str(stopped.value).startswith(f"step {step + 1}:")
    kept = sorted(p.name for p in (Path(bad.out) / "checkpoints").glob("*"))
    assert kept == [f"step-{s:06d}" for s in range(1, step + 1)]


def test_a_spoiled_weight_gradient_is_named(tiny_run):
    engine = loop.build(tiny_run())
    engine.parameters["2.bias"].register_hook(lambda grad: grad * float("inf"))
    before = engine.parameters["2.bias"].detach().clone()
    with pytest.raises(RunStopped, match=r"step 8: the gradient of 2.bias is -?(inf|nan) for the prompts '.*'"):
        direct.update(engine, 7)
    assert torch.equal(engine.parameters["2.bias"], before)


def test_spoiled_latents_are_named(tiny_run):
    engine = loop.build(tiny_run())
    with torch.no_grad():
        engine.parameters["0.weight"].fill_(float("nan"))
    with pytest.raises(RunStopped, match="step 1: the latent x_hat is nan for the prompt"):
        direct.update(engine, 0)


def test_the_evaluation_set_is_fixed_and_sees_the_averaged_weights(tiny_run):
    engine = loop.build(tiny_run(seed=1))
    other = loop.build(tiny_run(seed=2))
    assert fixed_set.evaluate(engine) == fixed_set.evaluate(other)  # the same set whatever the run's seed
    before = fixed_set.evaluate(engine)
    with torch.no_grad():
        for p in engine.parameters.values():
            p.add_(0.3)
    live = {n: p.clone() for n, p in engine.parameters.items()}
    assert fixed_set.evaluate(engine) == before
    assert all(torch.equal(p, live[n]) for n, p in engine.parameters.items())
    engine.ema.update()
    assert fixed_set.evaluate(engine) != before


def test_two_rewards_are_logged_apart_and_weighted(tiny_run, tiny_module):
    term = RewardTerm(reward=tiny_module.TinyReward(), threshold=2.0)
    one = direct.update(loop.build(tiny_run()), 0)
    two = direct.update(loop.build(tiny_run(rewards=(term, replace(term, weight=0.5)))), 0)
    assert two["loss"] == pytest.approx(1.5 * one["loss"], rel=1e-6)
    for name in ("tiny-reward", "tiny-reward-2"):
        assert two[f"reward/{name}"] + two[f"hinge/{name}"] == pytest.approx(2.0, rel=1e-6)
    unit = direct.update(loop.build(tiny_run(rewards=(replace(term, unit_gradient=True),))), 0)
    assert unit["slope/tiny-reward"] > 0 and unit["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_a_reward_may_have_a_device_and_a_dtype_of_its_own(tiny_run):
    """In bfloat16 beside a float32 run, and on another device by name (the only one that every machine has)."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watched:
        name: ClassVar[str] = "watched"

        def load(self, device, dtype):
            seen.append((device, dtype))

            def reward(images, prompts):
                seen.append(images.device)
                return images.mean((1, 2, 3))

            return reward

    term = RewardTerm(reward=Watched(), threshold=2.0)
    placed = [term, replace(term, dtype="bfloat16"), replace(term, device="cpu:0")]
    one, two, three = (direct.update(loop.build(tiny_run(rewards=(t,), evaluate_every=0)), 0) for t in placed)
    assert seen[0] == ("cpu", "float32") and ("cpu", "bfloat16") in seen and ("cpu:0", "float32") in seen
    assert one == two == three and one["grad_norm"] > 0
    with pytest.raises(UserError, match="device 'nowhere'"):
        loop.build(tiny_run(rewards=(replace(term, device="nowhere"),)))


def test_a_run_leaves_everything_it_promises(tiny_run):
    seen = []
    result = loop.train(tiny_run(), on_step=seen.append)
    assert [m["step"] for m in seen] == [1, 2, 3, 4]
    lines = read_metrics(result.out)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4]
    assert {
        "reward",
        "reward_std",
        "fraction_above_threshold",
        "grad_norm",
        "d_j",
        "d_0",
        "k",
        "j",
        "seconds",
    } <= lines[1].keys()
    assert [m["step"] for m in lines if "evaluation_reward" in m] == [0, 2, 4]
    assert lines[-1]["evaluation_reward"] > lines[0]["evaluation_reward"]
    assert json.loads((result.out / "summary.json").read_text()) == result.summary
    assert result.summary["reward"] == {
        "before": lines[0]["evaluation_reward"],
        "after": lines[-1]["evaluation_reward"],
    }
    assert list((result.out / "tensorboard").glob("events.*"))


def test_the_pipeline_holds_the_averaged_weights(tiny_run):
    from safetensors.torch import load_file

    result = loop.train(tiny_run())
    saved = load_file(result.pipeline / "policy.safetensors")
    for name, value in result.engine.ema.shadow.items():
        assert torch.equal(saved[name], value)
        assert not torch.equal(saved[name], result.engine.parameters[name])


def test_a_folder_with_something_in_it_is_refused(tiny_run):
    run = tiny_run()
    Path(run.out).mkdir()
    (Path(run.out) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty; use `leapalign resume"):
        loop.train(run)
    assert (Path(run.out) / "thesis.txt").read_text() == "mine"


@dataclass(frozen=True, kw_only=True)
class Unloadable:
    """Stands for a model, prompts or a reward of many gigabytes."""

    name: ClassVar[str] = "judge"
    differentiable: ClassVar[bool] = False

    def load(self, *_):
        raise AssertionError("nothing is loaded before the run has been refused")


def test_a_reward_without_gradient_is_refused_before_anything_is_loaded(tiny_run, tiny_module):
    good = RewardTerm(reward=tiny_module.TinyReward(), threshold=2.0)
    bad = RewardTerm(reward=Unloadable(), threshold=2.0)
    run = tiny_run(model=Unloadable(), prompts=Unloadable(), rewards=(good, bad))
    with pytest.raises(UserError, match="the reward judge has no gradient, and leapalign trains by") as refused:
        loop.build(run)
    assert "leapalign evaluate --reward judge" in str(refused.value) and "differentiable one" in str(refused.value)


def test_an_unknown_device_is_a_sentence(tiny_run):
    with pytest.raises(UserError, match="device 'gpu'"):
        loop.train(tiny_run(device="gpu"))


def test_every_epoch_reads_every_prompt_once_in_another_order(tiny_run):
    orders = [[batches.prompt_index(0, e * 5 + i, 5) for i in range(5)] for e in range(3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [batches.prompt_index(1, i, 5) for i in range(15)] != [i for order in orders for i in order]


def test_prompts_are_encoded_before_the_first_step(tiny_run):
    run = tiny_run(steps=1, batch_size=2, evaluation_size=1)
    engine = loop.build(run)
    assert 2 <= len(engine.model.prepared) <= 3  # not all five


def test_seeds_depend_on_all_four_names():
    def first(**changes) -> float:
        names = {"seed": 1, "step": 2, "sample": 3, "purpose": "noise"} | changes
        seed = names.pop("seed")
        return float(torch.rand((), generator=generator(seed, **names)))

    values = [first(), first(seed=2), first(step=3), first(sample=2), first(purpose="draw")]
    assert len(set(values)) == 5 and first() == values[0]

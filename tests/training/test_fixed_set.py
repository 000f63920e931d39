"""Evaluations during training: each number derived a second time from images drawn by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import pytest
import torch

from leapalign.errors import UserError
from leapalign.evaluation.diversity import Pixels
from leapalign.evaluation.image_statistics import image_statistics
from leapalign.flow.rollout import rollout
from leapalign.monitors import Band, HeldOut, Monitors, StopWhen
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.prompts.base import ImageMonitor
from leapalign.run import RewardTerm
from leapalign.seeds import generator
from leapalign.shapeworld.monitor import WorldMonitor
from leapalign.training import batches, fixed_set, loop


@dataclass(frozen=True)
class Lengths:
    """Stands for a prompt set's own monitor: the mean brightness times the length of the prompt."""

    names: tuple[str, ...] = ("lengths",)

    def measure(self, images, prompts):
        return torch.tensor([[float(x.mean()) * len(p.text)] for x, p in zip(images, prompts)])

    def summary(self, values):
        return {"lengths": float(values.mean())}


@dataclass(frozen=True, kw_only=True)
class Told:
    name: ClassVar[str] = "told"

    def load(self) -> list[Prompt]:
        return [Prompt(f"prompt {'x' * i}") for i in range(7)]

    def monitor(self) -> ImageMonitor:
        return Lengths()


def images_of(engine, places):
    """Draw images of the fixed set by hand, with the averaged weights."""
    run, texts = engine.run, [p.text for p in batches.evaluation_set(engine.run, engine.prompts)]
    generators = [generator(run.evaluation_seed, step=n, sample=i, purpose="fixed set noise") for i, n in places]
    with torch.no_grad(), engine.ema.applied():
        velocity = engine.model.velocity(engine.model.encode([texts[i] for i, _ in places]))
        x_0 = rollout(velocity, engine.model.noise(generators), engine.sigmas)
    return engine.model.decode(x_0), [texts[i] for i, _ in places]


@pytest.fixture
def monitored(tiny_run, tiny_module):
    """monitored(**changes) -> an engine with every monitor on, whose average differs from its weights."""

    def build(**changes):
        monitors = Monitors(
            held_out=(HeldOut(reward=tiny_module.Toward()), HeldOut(reward=tiny_module.Toward(), device="cpu")),
            diversity_prompts=2,
            images_per_prompt=3,
            image_statistics=True,
            prompt_monitors=True,
        )
        run = tiny_run(**{"monitors": monitors, "evaluation_size": 5, "prompts": Told()} | changes)
        engine = loop.build(run)
        with torch.no_grad():
            for name, p in engine.parameters.items():
                engine.ema.shadow[name].add_(0.1)
                p.add_(1.0)
        return engine

    return build


def test_every_number_by_hand(monitored) -> None:
    engine = monitored()
    found = fixed_set.evaluate(engine)
    first, texts = images_of(engine, [(i, 0) for i in range(5)])
    more, more_texts = images_of(engine, [(i, n) for n in (1, 2) for i in range(2)])
    rewards = engine.rewards["tiny-reward"](first, texts)
    expected = {
        "evaluation_reward": float(rewards.mean()),
        "evaluation_fraction_above_threshold": 0.0,
        "held_out/toward": float((1 - first.mean((1, 2, 3))).mean()),
        "held_out/toward-2": float((1 - first.mean((1, 2, 3))).mean()),
    }
    groups = [[first[i], more[i], more[2 + i]] for i in range(2)]
    vectors = [[Pixels()(x[None])[0] for x in group] for group in groups]
    pairs = [float((a - b).square().mean().sqrt()) for group in vectors for a, b in combinations(group, 2)]
    expected["diversity/pixels"] = sum(pairs) / 6
    everything = torch.cat([first, more])
    expected |= {f"image/{name}": float(value.mean()) for name, value in image_statistics(everything).items()}
    lengths = [float(x.mean()) * len(text) for x, text in zip(everything, [*texts, *more_texts])]
    expected["lengths"] = sum(lengths) / len(lengths)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [5, 11])
def test_drift_by_hand(tiny_run, micro, num_steps) -> None:
    """Mean |v - v_base| along the averaged model's own trajectory, against a second model with the base's weights."""
    monitors = Monitors(drift_samples=3)
    same = {"num_sampling_steps": num_steps, "batch_size": 10, "evaluation_size": 5}
    engine = loop.build(tiny_run(monitors=monitors, micro_batch_size=micro, **same))
    run, base = engine.run, loop.build(tiny_run(**same)).model
    assert fixed_set.evaluate(engine)["drift"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in engine.ema.shadow.values():
            p.add_(0.05)
    live = {name: p.clone() for name, p in engine.parameters.items()}
    found = fixed_set.evaluate(engine)
    assert all(torch.equal(p, live[name]) for name, p in engine.parameters.items())
    texts = [p.text for p in batches.evaluation_set(run, engine.prompts)][:3]
    x = engine.model.noise([generator(0, step=0, sample=i, purpose="fixed set noise") for i in range(3)])
    expected = {}
    with torch.no_grad(), engine.ema.applied():
        v, v_base = (model.velocity(engine.model.encode(texts)) for model in (engine.model, base))
        for t in range(num_steps, 0, -1):
            expected[t] = float((v(x, engine.sigmas[t]) - v_base(x, engine.sigmas[t])).abs().mean())
            x = x - (engine.sigmas[t] - engine.sigmas[t - 1]) * v(x, engine.sigmas[t])
    kept = [num_steps - i * num_steps // 8 for i in range(8)] if num_steps > 8 else list(expected)
    for t in kept:
        assert found[f"drift/{t / num_steps:.3f}"] == pytest.approx(expected[t], rel=1e-4)
    assert found["drift"] == pytest.approx(sum(expected[t] for t in kept) / len(kept), rel=1e-4) and found["drift"] > 0
    assert sum(name.startswith("drift/") for name in found) == len(kept)


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(monitored, micro) -> None:
    one, other = monitored(), monitored(micro_batch_size=micro)
    assert fixed_set.evaluate(other) == pytest.approx(fixed_set.evaluate(one), rel=1e-5)


def test_the_share_above_every_threshold(monitored, tiny_module) -> None:
    engine = monitored()
    images, texts = images_of(engine, [(i, 0) for i in range(5)])
    scores = sorted(engine.rewards["tiny-reward"](images, texts).tolist())
    term = RewardTerm(reward=tiny_module.TinyReward(), threshold=(scores[2] + scores[3]) / 2)
    one = fixed_set.evaluate(monitored(rewards=(term,)))
    two = fixed_set.evaluate(monitored(rewards=(term, replace(term, threshold=(scores[3] + scores[4]) / 2))))
    assert one["evaluation_fraction_above_threshold"] == 0.4 and two["evaluation_fraction_above_threshold"] == 0.2


def test_more_prompts_than_the_set_has_are_all_of_it(monitored) -> None:
    engine = monitored()
    monitors = replace(engine.run.monitors, diversity_prompts=99)
    assert fixed_set.evaluate(monitored(monitors=monitors))["diversity/pixels"] > 0


def test_without_monitors_an_evaluation_draws_no_more(tiny_run, monkeypatch) -> None:
    engine, drawn = loop.build(tiny_run()), []
    noise = engine.model.noise
    engine.model.noise = lambda generators: drawn.append(len(generators)) or noise(generators)
    found = fixed_set.evaluate(engine)
    assert sum(drawn) == 3 and set(found) == {"evaluation_reward", "evaluation_fraction_above_threshold"}


def test_images_without_a_number_are_left_out(tiny_run) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wordy:
        name: ClassVar[str] = "wordy"

        def load(self, device, dtype):
            return lambda images, texts: torch.tensor([torch.nan if "and" in text else 2.0 for text in texts])

    engine = loop.build(tiny_run(monitors=Monitors(held_out=(HeldOut(reward=Wordy()),)), evaluation_size=5))
    assert fixed_set.evaluate(engine)["held_out/wordy"] == 2.0


def test_wrong_monitors_are_refused_before_anything_is_loaded(tiny_run, tiny_module) -> None:
    with pytest.raises(UserError, match="the prompts file have none"):
        loop.build(tiny_run(monitors=Monitors(prompt_monitors=True)))
    with pytest.raises(UserError, match=r"none of the rewards .* has an image embedding"):
        loop.build(tiny_run(monitors=Monitors(diversity_prompts=2, features="clip-image")))
    rule = StopWhen(evaluations=1, bands=(Band(monitor="brightness", least=0.5),))
    monitors = Monitors(image_statistics=True, held_out=(HeldOut(reward=tiny_module.Toward()),))
    with pytest.raises(UserError, match=r"no monitor 'brightness'; it has .*held_out/toward, image/edge_density"):
        loop.build(tiny_run(monitors=monitors, stop_when=rule))


def test_shapeworlds_prompts_count_their_open_colours() -> None:
    import numpy as np

    from leapalign.geneval.open_colors import entropy, open_colors
    from leapalign.geneval.rules import judge
    from leapalign.shapeworld.captions import scene_of
    from leapalign.shapeworld.detector import detect
    from leapalign.shapeworld.world import render

    prompts = ShapeWorldPrompts(split="test", num=4).load()
    monitor, rng = ShapeWorldPrompts().monitor(), np.random.default_rng(0)
    images = torch.from_numpy(render([scene_of(p.metadata, rng) for p in prompts]))
    values = torch.cat([monitor.measure(images[i : i + 5], prompts[i : i + 5]) for i in range(0, len(prompts), 5)])
    counts = open_colors([p.metadata for p in prompts], detect(images))
    assert values.shape == (24, 7) and float(values[:, :6].sum()) == sum(counts.values())
    assert monitor == WorldMonitor()
    found = monitor.summary(values)
    assert found == {"open_color_entropy": pytest.approx(entropy(counts)), "geneval_correct": 1.0}
    swapped = monitor.measure(images.roll(1, 0), prompts)
    verdicts = [judge(p.metadata, seen).correct for p, seen in zip(prompts, detect(images.roll(1, 0)))]
    assert 0 < sum(verdicts) < 24 and monitor.summary(swapped)["geneval_correct"] == pytest.approx(sum(verdicts) / 24)
    assert monitor.summary(values[:0]) == {"open_color_entropy": 0.0, "geneval_correct": 0.0}

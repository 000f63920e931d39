"""The value model alone: parity by a second derivation, its gradient, its memory, its state, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import ClassVar

import pytest
import torch

from leapalign.errors import RunStopped, UserError
from leapalign.rewards import PickScore
from leapalign.rewards.value_model import ValueModel
from leapalign.rewards.value_model.model import joined
from leapalign.rewards.value_model.parity import parity

PROMPTS = ["a red circle", "a blue circle left of a red square", "two squares"]


@dataclass(frozen=True, kw_only=True)
class Bright:
    """1 for bright images, 0 for others: a rule without gradient; `scale` moves it out of [0, 1]."""

    name: ClassVar[str] = "bright"
    differentiable: ClassVar[bool] = False

    scale: float = 1.0

    def load(self, device: str, dtype: str):
        return lambda images, prompts: self.scale * (images.detach().mean((1, 2, 3)) > 0.5).float()


def config(**changes) -> ValueModel:
    small = {"of": Bright(), "width": 4, "pixels": 8, "train_steps": 3, "train_batch": 8, "warmup_updates": 1}
    return ValueModel(**(small | changes))


BOTH = [config(), config(backbone="embedded:reward")]
both = pytest.mark.parametrize("settings", BOTH, ids=["pixels", "clip"])


def images(count: int = 3, dtype: torch.dtype = torch.float32, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Images of random brightness, [count, 3, size, size]."""
    rng = torch.Generator().manual_seed(seed)
    level = torch.rand(count, 1, 1, 1, generator=rng, dtype=dtype)
    return (level + 0.1 * torch.rand(count, 3, size, size, generator=rng, dtype=dtype)).clamp(0, 1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(reward, seed: int, count: int = 12):
    """Show the value model fresh samples, as an update does."""
    batch, prompts = images(count, seed=seed), [PROMPTS[i % 3] for i in range(count)]
    with torch.no_grad():
        reward.observe(batch, prompts, reward(batch, prompts))
    seen = joined(reward.seen)
    reward.seen.clear()
    return seen


def test_parity_is_the_share_of_pairs_in_the_true_order():
    predicted, true = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2]), torch.tensor([0.0, 1.0, 0.0, 2.0, 2.0])
    pairs = [(i, j) for i, j in permutations(range(5), 2) if true[i] > true[j]]
    wins = sum(1.0 if predicted[i] > predicted[j] else 0.5 * bool(predicted[i] == predicted[j]) for i, j in pairs)
    assert parity(predicted, true) == pytest.approx(wins / len(pairs), abs=1e-12)
    assert parity(true, true) == 1 and parity(-true, true) == 0
    assert parity(predicted, torch.ones(5)) is None


def test_parity_of_verdicts_is_the_area_under_the_roc_curve():
    score, label = torch.rand(200, generator=rng()).double(), torch.rand(200, generator=rng(1)) < 0.4
    ranks = score.argsort().argsort().double() + 1  # Mann and Whitney: the ranks' sum of the positive samples
    n = int(label.sum())
    area = float(ranks[label].sum() - n * (n + 1) / 2) / (n * (200 - n))
    assert parity(score, label.float()) == pytest.approx(area, abs=1e-12)


def test_parity_within_prompts_does_not_count_that_one_prompt_is_harder():
    predicted, true = torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    prompt = torch.tensor([5, 5, 7, 7])
    assert parity(predicted, true) == 1
    assert parity(-predicted, true, prompt) == 0  # of one pair alone: rows 2 and 3
    assert parity(predicted, true, torch.tensor([5, 5, 7, 5])) is None


@both
def test_gradients_are_finite_differences(settings):
    for output in ("score", "logit"):
        reward = replace(settings, output=output).load(dtype="float64")
        x = images(2, torch.float64).requires_grad_()
        torch.autograd.gradcheck(lambda x, r=reward: r(x, PROMPTS[:2]), x, eps=1e-6, atol=1e-6, fast_mode=True)
        (grad,) = torch.autograd.grad(reward(x, PROMPTS[:2]).sum(), x)
        assert grad.abs().amax() > 1e-6


@both
def test_scores_depend_on_their_own_image_and_prompt(settings):
    reward, x = settings.load(), images(3)
    whole = reward(x, PROMPTS)
    alone = torch.cat([reward(x[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert (reward(x, PROMPTS[::-1]) - whole).abs()[0] > 1e-6
    assert ((whole > 0) & (whole < 1)).all() and whole.shape == (3,)
    assert torch.equal(settings.load()(x, PROMPTS), whole), "first weights come from the seed alone"
    assert not torch.equal(replace(settings, seed=1).load()(x, PROMPTS), whole)


@both
def test_it_learns_a_rule_and_parity_is_taken_before_it_trains(settings):
    reward = replace(settings, train_steps=30, learning_rate=3e-3, parity_window=24).load()
    first = shown(reward, 0)
    assert reward.learn(first, rng())["parity"] == parity(first.predicted, first.true)
    for round in range(1, 12):
        found = reward.learn(shown(reward, round), rng(round))
    assert found["parity"] > 0.9 and found["loss"] < 0.5 and reward.believed
    assert len(reward.window.true) == 24 and len(reward.buffer.true) == 12 * 12


def test_the_buffer_keeps_the_newest_samples():
    reward = config(buffer_size=20).load()
    seen = [shown(reward, round) for round in range(3)]
    for round, fresh in enumerate(seen):
        reward.learn(fresh, rng(round))
    assert torch.equal(reward.buffer.true, torch.cat([fresh.true for fresh in seen])[-20:])
    assert torch.equal(reward.buffer.image, torch.cat([fresh.image for fresh in seen])[-20:])


def test_it_is_believed_after_the_warm_up_and_while_parity_is_high():
    reward = config(warmup_updates=2, least_parity=0.7, parity_window=12).load()
    fresh = shown(reward, 0)
    right, wrong = replace(fresh, predicted=fresh.true), replace(fresh, predicted=-fresh.true)
    assert not reward.believed
    reward.learn(right, rng())
    assert reward.parity == 1 and not reward.believed, "the warm-up is not over"
    reward.learn(right, rng())
    assert reward.believed
    reward.learn(wrong, rng())
    assert reward.parity == 0 and not reward.believed
    reward.learn(right, rng())
    assert reward.believed, "trust comes back"
    reward.learn(replace(right, true=torch.ones(12)), rng())
    assert reward.parity is None and not reward.believed, "equal rewards tell nothing"


@both
def test_state_continues_bit_for_bit(settings):
    once, again = settings.load(), settings.load()
    once.learn(shown(once, 0), rng())
    state = once.state()
    again.restore(state)
    for reward in (once, again):
        reward.learn(shown(reward, 1), rng(1))
    assert all(torch.equal(value, again.state()[name]) for name, value in once.state().items())
    assert not torch.equal(once.state()["buffer.true"], state["buffer.true"]), "a state is a copy"
    with pytest.raises(UserError, match="another backbone or width"):
        replace(settings, width=8).load().restore(state)


def test_rewards_that_the_loss_cannot_learn_are_refused():
    reward = config(of=Bright(scale=2.0)).load()
    with pytest.raises(UserError, match=r"gave 0 to 2, and cross-entropy learns rewards in \[0, 1\]; use loss squared"):
        reward.learn(shown(reward, 0), rng())
    squared = config(of=Bright(scale=2.0), loss="squared").load()
    assert squared.learn(shown(squared, 0), rng())["loss"] > 0


def test_training_that_diverges_stops():
    reward = config(learning_rate=1e30).load()
    with pytest.raises(RunStopped, match="lower its learning_rate"):
        for round in range(3):
            reward.learn(shown(reward, round), rng())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"of": config()}, "is a value model itself"),
        ({"pixels": 20}, "multiple of 8"),
        ({"least_parity": 1.5}, "try 0.7"),
        ({"output": "logit", "loss": "squared"}, "use output score"),
        ({"train_steps": 0}, "at least 1"),
        ({"learning_rate": float("nan")}, "finite"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(UserError, match=words):
        config(**changes)


def test_evaluations_judge_by_the_reward_that_was_learnt():
    assert config().in_evaluations() == Bright()
    assert PickScore().in_evaluations() == PickScore()
    assert [source.path for source in config(backbone="embedded:reward").sources()] == ["embedded:reward"]

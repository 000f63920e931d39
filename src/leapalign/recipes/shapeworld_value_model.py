"""LeapAlign through a value model of GenEval's verdict on ShapeWorld, which has no gradient (docs/value-model.md).

The model, prompts, sampler, optimiser and anchor are `shapeworld`'s, the reward is `shapeworld-flow-grpo-verdict`'s.
The policy's rate warms up after the value model's own warm-up, in which the policy rests. The value model's settings
are ours and were not searched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from leapalign.methods.leapalign import LeapAlign
from leapalign.monitors import HeldOut
from leapalign.recipes.shapeworld import WATCHED, shapeworld
from leapalign.rewards.value_model import ValueModel
from leapalign.run import RewardTerm, Run
from leapalign.shapeworld.verdict import ShapeWorldVerdict

RESTING = 20  # updates in which only the value model learns


def shapeworld_value_model() -> Run:
    """LeapAlign through a head on the embedded reward's features, which learns the verdict."""
    return _through(ValueModel(of=ShapeWorldVerdict(), backbone="embedded:reward", output="logit"))


def shapeworld_value_model_scratch() -> Run:
    """LeapAlign through a convolutional network that learns the verdict from nothing but the run's own images."""
    run, name = _through(ValueModel(of=ShapeWorldVerdict(), output="logit")), "shapeworld-value-model-scratch"
    return replace(run, name=name, out=f"runs/{name}")


SHAPEWORLD_VALUE_MODEL: dict[str, Callable[[], Run]] = {
    "shapeworld-value-model": shapeworld_value_model,
    "shapeworld-value-model-scratch": shapeworld_value_model_scratch,
}


def _through(reward: ValueModel) -> Run:
    run = shapeworld(LeapAlign(nested_scale=1.0, step_draws="stratified"))
    verdict = HeldOut(reward=ShapeWorldVerdict())
    return replace(
        run,
        name="shapeworld-value-model",
        out="runs/shapeworld-value-model",
        rewards=(RewardTerm(reward=replace(reward, warmup_updates=RESTING), threshold=3.0),),  # a logit: p = 0.95
        warmup_steps=RESTING + run.warmup_steps,
        monitors=replace(WATCHED, held_out=(verdict, *WATCHED.held_out)),
    )

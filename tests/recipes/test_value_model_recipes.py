"""The recipes of value models: what they share with Flow-GRPO's on the verdict, and that their settings go together."""

from __future__ import annotations

import pytest

from leapalign.codec import dumps, loads
from leapalign.recipes import RECIPES
from leapalign.recipes.shapeworld_value_model import SHAPEWORLD_VALUE_MODEL
from leapalign.run import Run
from leapalign.training.refusals import check_method


@pytest.mark.parametrize("name", SHAPEWORLD_VALUE_MODEL)
def test_it_learns_the_reward_of_flow_grpo_on_the_same_run(name):
    run, other = RECIPES[name](), RECIPES["shapeworld-flow-grpo-verdict"]()
    assert run.name == name and run.out == f"runs/{name}" and loads(dumps(run), Run) == run
    assert run.rewards[0].reward.of == other.rewards[0].reward == run.monitors.held_out[0].reward
    for field in ("model", "prompts", "batch_size", "num_sampling_steps", "learning_rate", "ema_decay", "steps"):
        assert getattr(run, field) == getattr(other, field)
    assert run.warmup_steps > run.rewards[0].reward.warmup_updates, "the policy's warm-up comes after the rest"
    check_method(run)

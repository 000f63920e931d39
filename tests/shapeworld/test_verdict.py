"""The verdict as a reward: right and wrong scenes, other texts, NaN, and that direct-gradient methods refuse it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from leapalign.errors import UserError
from leapalign.lookup.recipes import load_recipe
from leapalign.recipes import shapeworld_leapalign
from leapalign.shapeworld.captions import near_misses, scene_of, train_prompts
from leapalign.shapeworld.verdict import ShapeWorldVerdict
from leapalign.shapeworld.world import render
from leapalign.training.refusals import check_method


def pictures(captions) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.as_tensor(render([scene_of(caption, rng) for caption in captions]))


def test_right_scenes_get_1_and_near_misses_0():
    captions = train_prompts(24)
    images, reward = pictures(captions), ShapeWorldVerdict().load()
    right = reward(images, [caption["prompt"] for caption in captions])
    wrong = reward(images, [near_misses(caption)[0]["prompt"] for caption in captions])
    assert right.dtype == torch.float32 and float(right.mean()) > 0.9 and float(wrong.mean()) < 0.1
    assert set(right.tolist() + wrong.tolist()) <= {0.0, 1.0}


def test_other_texts_and_nan():
    images, reward = pictures(train_prompts(2)), ShapeWorldVerdict().load()
    with pytest.raises(UserError, match="'a dog' is no caption of ShapeWorld"):
        reward(images, ["a dog", "a dog"])
    images[1, 0, 3, 3] = torch.nan
    scores = reward(images, [caption["prompt"] for caption in train_prompts(2)])
    assert scores.isnan().tolist() == [False, True]


def test_policy_gradients_take_it_and_direct_gradients_refuse_it():
    run = load_recipe("shapeworld-flow-grpo-verdict", {})
    check_method(run)
    with pytest.raises(UserError, match="the reward shapeworld-verdict has no gradient, and leapalign trains by"):
        check_method(replace(shapeworld_leapalign(), rewards=run.rewards))

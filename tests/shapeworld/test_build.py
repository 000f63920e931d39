"""What the embedded reward learns from: near misses are false, spoiled pictures are bad, attacks go uphill."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leapalign.evaluation.geneval import judge
from leapalign.shapeworld import captions as c
from leapalign.shapeworld.build.clip import JUDGE, NEGATIVES, REWARD, Batch, Trainee, contrast
from leapalign.shapeworld.build.harden import attacked, hard_loss
from leapalign.shapeworld.build.spoil import edited, spoil
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import MAX_OBJECTS, Scene, render


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [c.scene_of(c.draw(c.split(tag)[0], rng), rng) for tag in c.TASKS for _ in range(40)]


def test_an_edit_changes_one_object(scenes):
    rng = np.random.default_rng(1)
    for scene in scenes:
        other = edited(scene, rng)
        assert other != scene and len(set(scene) - set(other)) <= 1 and len(set(other) - set(scene)) <= 1
        assert len(other) <= MAX_OBJECTS


def test_spoiled_pictures_are_bad_to_the_rule_based_judge(scenes):
    """Not one in all, since a bend may be slight; but most, where every clean one is good."""
    images, is_bad = spoil(scenes, np.random.default_rng(2))
    assert images.shape == (len(scenes), 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert is_bad.float().mean() > 0.7

    def intact(pictures: torch.Tensor) -> torch.Tensor:
        """Whether every object of the scene is found, and nothing else."""
        wanted = [sorted((o.shape, o.color) for o in scene) for scene in scenes]
        found = [sorted((d.label, d.color) for d in each) for each in detect(pictures)]
        return torch.tensor([a == b for a, b in zip(wanted, found)])

    assert intact(torch.from_numpy(render(scenes))).float().mean() > 0.97
    assert intact(images)[is_bad].float().mean() < 0.3


def test_contrast_counts_spoiled_pictures_and_leaves_out_what_never_counts():
    logits, wrong = torch.eye(3) * 4, torch.zeros(3, 2)
    plain = contrast(logits, wrong)
    torch.testing.assert_close(contrast(logits, wrong, torch.full((3, 2), -1e4)), plain)
    assert contrast(logits, wrong, torch.full((3, 2), 4.0)) > plain + 0.5


@pytest.mark.parametrize("size", [REWARD, JUDGE], ids=["reward", "judge"])
def test_an_attack_has_its_length_and_goes_uphill(size):
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    batch, model = Batch.make(4, rng), Trainee(size).eval()
    bad, is_bad = spoil(batch.scenes[:4], rng)
    images = torch.cat([torch.from_numpy(render(batch.scenes)), bad])
    with torch.no_grad():
        text, wrong = model.read(batch.captions)[0], model.read(batch.misses)[0]
    assert len(batch.misses) == NEGATIVES * len(batch.captions) and len(batch.scenes) == 8

    def loss(x: torch.Tensor) -> torch.Tensor:
        return hard_loss(model, batch, is_bad, text, wrong, x)

    moved = attacked(images, torch.full((12, 1, 1, 1), 0.3), loss)
    assert (moved - images).flatten(1).norm(dim=1).max() <= 0.3 + 1e-5
    assert (moved - images).flatten(1).norm(dim=1).min() > 0.1  # clamping to [0, 1] takes a part of it
    assert loss(moved) > loss(images)
    assert torch.equal(attacked(images, torch.zeros(12, 1, 1, 1), loss), images)


def test_scenes_of_a_batch_are_true_of_their_captions():
    batch = Batch.make(20, np.random.default_rng(4))
    detections = detect(render(batch.scenes))
    verdicts = [judge(caption, found).correct for found, caption in zip(detections, batch.captions)]
    assert np.mean(verdicts) > 0.9
    assert not batch.skip.diagonal().any()

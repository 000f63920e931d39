"""Pairwise distances against loops over pairs, the choice of prompts and of the feature space."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.evaluation.diversity import (
    Diverse,
    Embedding,
    Pixels,
    diverse,
    find_features,
    mean_pairwise_distance,
    spaces_of,
)
from leapalign.evaluation.evaluate import evaluate
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.images import to_pil, to_tensor
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.rewards.adapt import OnDevice, complete


def images(num: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_pixels_against_a_loop() -> None:
    some = images(6)
    small = some.unflatten(2, (8, 2)).unflatten(4, (8, 3)).mean((3, 5)).flatten(1).double()  # 8 x 8
    expected = [
        sum(float((a - b).square().mean().sqrt()) for a, b in combinations(group, 2)) / 3 for group in small.split(3)
    ]
    space = Pixels()
    found = mean_pairwise_distance(space, space(some).unflatten(0, (2, 3)))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_black_and_white_are_furthest_apart() -> None:
    ends = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    assert float(mean_pairwise_distance(Pixels(), Pixels()(ends)[None])) == pytest.approx(1)
    assert float(mean_pairwise_distance(Pixels(), Pixels()(ends[[0, 0]])[None])) == 0


def test_embeddings_by_their_cosine(reward_config) -> None:
    reward = reward_config.load()
    space, some = find_features("clip-image", {"pick": reward}), images(4)
    vectors = torch.nn.functional.normalize(space(some).double(), dim=-1)
    expected = sum(1 - float(a @ b) for a, b in combinations(vectors, 2)) / 6
    assert float(mean_pairwise_distance(space, space(some)[None])) == pytest.approx(expected, abs=1e-6)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert float(mean_pairwise_distance(Embedding(lambda x: x), opposite)) == 2


def test_the_embedding_is_that_of_the_last_reward_that_has_one(reward_config, held_out_config) -> None:
    def plain(images, prompts):
        return images.mean((1, 2, 3))

    trained, judge = reward_config.load(), OnDevice(reward=held_out_config.load(), device="cpu")
    rewards = {"trained": trained, "judge": judge, "mine": complete("mine", plain)}
    expected = held_out_config.load().image_embedding()(images(2))
    assert torch.equal(find_features("clip-image", rewards)(images(2)), expected)
    assert list(spaces_of(rewards)) == ["pixels", "clip-image"]
    assert list(spaces_of({"mine": complete("mine", plain)})) == ["pixels"]
    with pytest.raises(UserError, match=r"none of the rewards \(mine\) has an image embedding"):
        find_features("clip-image", {"mine": complete("mine", plain)})
    with pytest.raises(UserError, match="expected one of pixels, clip-image"):
        find_features("dino", rewards)


def test_prompts_are_spread_over_the_tasks() -> None:
    prompts = ShapeWorldPrompts(split="test", num=60).load()
    chosen = diverse(prompts).prompts
    tags = [prompt.metadata["tag"] for prompt in chosen]
    assert len(chosen) == 30 and {tags.count(tag) for tag in tags} == {5}
    assert len({prompt.text for prompt in chosen}) == 30
    plain = [Prompt(f"prompt {i}") for i in range(60)]
    assert [prompt.text for prompt in diverse(plain).prompts] == [f"prompt {i}" for i in range(0, 60, 2)]
    with pytest.raises(UserError, match="at least 2 images"):
        Diverse(prompts=plain, images_per_prompt=1)


def test_evaluation_measures_the_images_that_it_draws(model_config, reward_config, tmp_path) -> None:
    model, reward = model_config.load("cpu", "float32"), reward_config.load("cpu", "float32")
    texts = ["a red circle", "a circle", "a square"]
    prompts, sampling = [Prompt(text) for text in texts], Sampling(num_steps=2, batch_size=4)
    several = Diverse(prompts=prompts, images_per_prompt=3)
    settings = {"sampling": sampling, "rewards": {"pick": reward}, "detector": None, "diversity": several}
    found = evaluate(model, prompts[:1], folder=tmp_path, **settings).diversity
    assert len(list(tmp_path.glob("diversity/*/samples/*.png"))) == 9
    drawn = draw_images(model, texts, Sampling(num_steps=2, images_per_prompt=3))
    drawn = torch.stack([to_tensor(to_pil(image)) for image in drawn])  # image files have 8 bits
    for name, space in spaces_of({"pick": reward}).items():
        expected = mean_pairwise_distance(space, space(drawn).detach().unflatten(0, (3, 3)))
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0)
    assert evaluate(model, prompts[:1], **{**settings, "diversity": None}).diversity == {}

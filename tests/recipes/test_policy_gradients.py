"""Recipes of policy gradients: the papers' settings from a table of the test's own, and each end to end, tiny."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leapalign.codec import dumps, loads
from leapalign.methods.policy_gradient import SamplesFromAverage
from leapalign.recipes import RECIPES
from leapalign.recipes.policy_gradients import PAPER_POLICY_GRADIENTS
from leapalign.recipes.shapeworld_policy_gradients import SHAPEWORLD_POLICY_GRADIENTS
from leapalign.run import Run
from leapalign.training import loop
from leapalign.training.refusals import check_method
from leapalign.tuning.lora import LoRA
from tiny_recipes import tiny, write_folders

# name -> (steps, T, samples a prompt, batch, updates a rollout, learning rate)
SETTINGS = {
    "flux-dance-grpo-hpsv21": (300, 16, 12, 96, 1, 1e-5),
    "flux-mix-grpo-hpsv21": (1200, 25, 12, 96, 4, 1e-5),
    "flux-mix-grpo-flash-hpsv21": (1200, 25, 12, 96, 4, 1e-5),
    "sd35m-flow-grpo-pickscore": (200, 10, 24, 1152, 1, 3e-4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


def test_there_is_every_recipe_and_each_can_train():
    every = PAPER_POLICY_GRADIENTS | SHAPEWORLD_POLICY_GRADIENTS
    assert RECIPES.items() > every.items() and PAPER_POLICY_GRADIENTS.keys() == SETTINGS.keys()
    for name, recipe in every.items():
        run = recipe()
        assert run.name == name and run.out == f"runs/{name}" and loads(dumps(run), Run) == run
        check_method(run)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_of_the_papers(name):
    run = PAPER_POLICY_GRADIENTS[name]()
    found = (run.steps, run.num_sampling_steps, run.samples_per_prompt, run.batch_size, run.updates_per_rollout)
    assert (*found, run.learning_rate) == SETTINGS[name]
    method, size = run.method, (run.model.height, run.model.width)
    assert (method.clip_range, method.advantage_limit) == (1e-4, 5)
    if name.startswith("flux"):
        assert size == (720, 720) and method.kl_weight == 0 and method.same_noise
    if "dance" in name:
        assert (method.eta, method.trained_share) == (0.3, 0.6)
    elif "mix" in name:
        assert (method.window, method.shift_every, method.noise_level) == (4, 25, 0.7)
        assert method.tail_share == (0.4 if "flash" in name else 1)
    else:
        assert size == (512, 512) and run.model.guidance_scale == 4.5 and run.tuning == LoRA(rank=32, alpha=64)
        assert (method.noise_level, method.kl_weight) == (0.7, 0.01)


@pytest.mark.parametrize("name", PAPER_POLICY_GRADIENTS)
def test_a_tiny_copy_trains(name, folders, tmp_path):
    run = replace(PAPER_POLICY_GRADIENTS[name](), samples_per_prompt=2)
    uses = min(run.updates_per_rollout, 2)
    run = replace(tiny(replace(run, updates_per_rollout=1), folders, tmp_path / "run"), updates_per_rollout=uses)
    result = loop.train(replace(run, checkpoint_every=2))
    assert result.summary["steps"] == 2 and result.summary["skipped"] == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_lora_run_is_killed_and_resumed_to_the_same_weights(guidance, tmp_path):
    """The embedded pipeline with monitors, a LoRA with dropout and true guidance; killed between two saves."""
    run = SHAPEWORLD_POLICY_GRADIENTS["shapeworld-flow-dppo"]()
    small = {"batch_size": 8, "micro_batch_size": 2, "samples_per_prompt": 4, "num_sampling_steps": 3, "steps": 4}
    small |= {
        "checkpoint_every": 2,
        "evaluate_every": 4,
        "evaluation_size": 8,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
    }
    run = replace(run, **small, tuning=LoRA(rank=4, dropout=0.1), model=replace(run.model, guidance_scale=guidance))
    whole = loop.train(replace(run, out=str(tmp_path / "whole")))

    def kill(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    part = replace(run, out=str(tmp_path / "part"))
    with pytest.raises(KeyboardInterrupt):
        loop.train(part, on_step=kill)
    resumed = loop.train(part, resume=True)
    for name, p in whole.engine.parameters.items():
        assert p.equal(resumed.engine.parameters[name])
        assert whole.engine.ema.shadow[name].equal(resumed.engine.ema.shadow[name])
    lines = [(Path(run.out) / "metrics.jsonl").read_text() for run in (whole.engine.run, resumed.engine.run)]
    assert "open_color_entropy" in lines[0] and lines[0].count("\n") == lines[1].count("\n")


def test_nft_is_the_only_one_that_samples_from_its_average():
    found = {n for n, r in SHAPEWORLD_POLICY_GRADIENTS.items() if isinstance(r().method, SamplesFromAverage)}
    assert found == {"shapeworld-diffusion-nft"}

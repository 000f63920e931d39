"""Self-checks of a run before it spends hours; each takes a few forwards of one sample (Run.self_checks).

At start-up: the sampler agrees with diffusers' pipeline on the first prompt and noise, over a few steps; each reward
has a finite, non-zero gradient at the sampled image (for policy gradients: a finite score). At the first save: the
reloaded model has the same velocity. The checks change no weight, gradient or random state of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.methods.policy_gradient import PolicyGradient
from leapalign.models.base import Conditioning
from leapalign.models.diffusers_reference import pipeline_latents
from leapalign.models.pipeline import PipelineModel
from leapalign.storage.atomic import SCRATCH
from leapalign.training.batches import micro_batches, noise_generators

if TYPE_CHECKING:
    from leapalign.training.engine import Engine

STEPS = 4  # sampling steps to compare; at most the run's own
RELOADED_BYTES = 2**31  # larger policies are not loaded a second time
# Largest difference / largest value. Wrong guidance, grid, sign or scale differ by more; two guidance branches in one
# forward, as in diffusers, round differently from two forwards.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
OFF = "--no-self-checks leaves these checks out"


def at_start(engine: Engine) -> None:
    """Check the sampler and the rewards on the run's first sample. Raises UserError."""
    prompts, noise, text = _first_sample(engine)
    num_steps = min(STEPS, engine.run.num_sampling_steps)
    sigmas = engine.model.sigmas(num_steps).to(noise.device)
    with torch.no_grad():
        latents = rollout(engine.model.velocity(text), noise, sigmas)
    expected = pipeline_latents(engine.model, engine.run.model, text, noise, num_steps)
    if expected is not None:
        _compare(engine, latents, expected, f"{num_steps} sampling steps differ from those of diffusers' own pipeline")
    with torch.no_grad():
        images = engine.model.decode(latents)
    for name, reward in engine.rewards.items():
        check = _check_score if isinstance(engine.run.method, PolicyGradient) else _check_reward
        check(name, reward, images, prompts)


def at_first_save(engine: Engine) -> None:
    """Compare the saved model, loaded again, with the trained one, if it is small enough to be in memory twice."""
    run, policy = engine.run, engine.model.policy
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    if not isinstance(engine.model, PipelineModel) or size > RELOADED_BYTES:  # only a pipeline can be loaded again
        return
    model = engine.whole_model(frozen=True)
    if model is None:
        return  # only rank 0 checks
    if engine.shards:
        model.policy.to(engine.sigmas.device)
    folder = Path(run.out) / f"{SCRATCH}self-check"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        run.tuning.save(model, folder)
        again = run.tuning.load_tuned(run.model, str(folder), str(engine.sigmas.device), run.dtype)
        _, noise, text = _first_sample(engine)
        with torch.no_grad():
            ours, reloaded = (m.velocity(text)(noise, engine.sigmas[-1]) for m in (model, again))
        _compare(engine, reloaded, ours, "the saved model, opened again, has another velocity than the trained one")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_reward(name: str, reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> None:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        score = reward(leaf, prompts)
        if not score.requires_grad:
            raise UserError(f"reward {name}: it carries no gradient; direct-gradient methods need a differentiable one")
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
    _check_finite(name, "score", score.detach(), prompts)
    _check_finite(name, "gradient", gradient, prompts)
    if not bool(gradient.any()):
        raise UserError(
            f"self-check: the gradient of the reward {name} is zero at the first image ({prompts}), so it cannot "
            f"train; is it constant, rounded, or cut off by detach() or no_grad()? {OFF}"
        )


@torch.no_grad()
def _check_score(name: str, reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> None:
    _check_finite(name, "score", reward(images, prompts), prompts)


def _check_finite(name: str, what: str, tensor: Tensor, prompts: list[str]) -> None:
    if not bool(torch.isfinite(tensor).all()):
        bad = float(tensor[~torch.isfinite(tensor)].flatten()[0])
        raise UserError(f"self-check: the {what} of the reward {name} is {bad} at the first image ({prompts}); {OFF}")


def _compare(engine: Engine, ours: Tensor, expected: Tensor, problem: str) -> None:
    difference = float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())
    tolerance = TOLERANCE[engine.run.dtype]
    if not difference <= tolerance:  # also true for NaN
        raise UserError(
            f"self-check: {problem}: by {difference:.2g} of the largest value, expected at most {tolerance:g}. "
            f"{type(engine.run.model).__name__} does not fit this folder, or this version of diffusers; {OFF}"
        )


def _first_sample(engine: Engine) -> tuple[list[str], Tensor, Conditioning]:
    run = engine.run
    micro = next(micro_batches(run, engine.prompts, 0))
    prompts = [micro.prompts[0]]
    noise = engine.model.noise(noise_generators(run.seed, 0, [0])).to(engine.sigmas.device)
    return prompts, noise, engine.model.encode(prompts)

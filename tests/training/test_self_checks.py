"""The run's checks of itself: each finds the fault that it is for, and they change nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_pipelines
from leapalign.errors import UserError
from leapalign.methods.draft import DRaFT
from leapalign.models import diffusers_reference
from leapalign.models import pipeline as pipe
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.training import direct, loop, self_checks
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES
from tiny_clip import write_tiny_clip


@dataclass(frozen=True, kw_only=True)
class Flawed:
    name: ClassVar[str] = "flawed"

    flaw: str

    def load(self, *_):
        def reward(images, prompts):
            score = images.mean((1, 2, 3))
            if self.flaw == "zero":
                return score * 0
            if self.flaw == "rounded":
                return score.detach().round() + score.clamp(min=2)
            if self.flaw == "detached":
                return score.detach()
            if self.flaw == "infinite":
                return score / 0
            return score.detach() + (score - score.detach()).sqrt()  # its slope at 0 is infinite

        return reward


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("zero", r"the gradient of the reward flawed is zero at the first image \(\['.*'\]\), so it cannot train"),
        ("rounded", "the gradient of the reward flawed is zero"),
        ("detached", "reward flawed: it carries no gradient"),
        ("infinite", "the score of the reward flawed is inf"),
        ("steep", "the gradient of the reward flawed is inf"),
    ],
)
def test_a_reward_that_cannot_train_is_found_before_the_first_step(tiny_run, flaw, message):
    run = tiny_run(rewards=(RewardTerm(reward=Flawed(flaw=flaw), threshold=2.0),))
    with pytest.raises(UserError, match=message):
        loop.train(run)
    assert not (Path(run.out) / "run.json").exists()
    if flaw == "zero":
        self_checks.at_start(loop.build(tiny_run()))  # the reward of the recipe passes
        assert loop.train(replace(run, self_checks=False)).summary["steps"] == 4


OTHERS = ("flux2", "qwen-image", "z-image")  # FLUX.2 distilled, the others guided


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=False), folder / "sd3")
    tiny_pipelines.save(tiny_pipelines.flux_pipeline(), folder / "flux")
    for family in OTHERS:
        tiny_pipelines.save(FAMILIES[family].build(), folder / family)
    write_tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return folder


@pytest.fixture(params=["sd3", "sd3 without guidance", "flux", "flux with true guidance", *OTHERS])
def run(request, parts, tmp_path) -> Run:
    model = {
        "sd3": SD3(path=str(parts / "sd3"), height=16, width=24, guidance_scale=3.0, max_sequence_length=0),
        "flux": Flux(path=str(parts / "flux"), height=16, width=24, max_sequence_length=8),
        **{family: FAMILIES[family].config(str(parts / family)) for family in OTHERS},
    }[request.param.split()[0]]
    if request.param == "sd3 without guidance":
        model = replace(model, guidance_scale=1.0)
    if request.param == "flux with true guidance":
        model = replace(model, true_cfg_scale=2.0)
    return Run(
        name="x",
        model=model,
        method=DRaFT(),
        rewards=(RewardTerm(reward=PickScore(path=str(parts / "clip")), threshold=2.0),),
        prompts=PromptFile(path=str(parts / "prompts.txt")),
        out=str(tmp_path / "run"),
        steps=1,
        batch_size=1,
        num_sampling_steps=6,
        evaluate_every=0,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("dtype", "tuning"), [("float32", FULL), ("bfloat16", FULL), ("bfloat16", LoRA(rank=2))], ids=str
)
def test_our_sampler_agrees_and_a_wrong_one_is_found(run, monkeypatch, dtype, tuning):
    engine = loop.build(replace(run, dtype=dtype, tuning=tuning))
    state = torch.random.get_rng_state()
    self_checks.at_start(engine)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in engine.parameters.values())
    compared = []
    monkeypatch.setattr(self_checks, "_compare", lambda _, ours, expected, __: compared.append((ours, expected)))
    self_checks.at_start(engine)
    (pair,) = compared
    assert pair[0].shape == pair[1].shape == (1, *engine.model.latent_shape)
    difference = (pair[0] - pair[1]).abs().max() / pair[1].abs().max()
    print(f"{run.model.name} {dtype} {tuning.name}: {difference:.1e}")
    assert difference < (1e-5 if dtype == "float32" else 0.05)
    monkeypatch.undo()
    grid = engine.model.grid
    monkeypatch.setattr(engine.model, "grid", lambda num_steps: grid(num_steps) ** 1.2)
    with pytest.raises(
        UserError, match="self-check: 4 sampling steps differ from those of diffusers' own pipeline: by"
    ):
        self_checks.at_start(engine)


def test_the_saved_model_is_opened_again_and_a_wrong_one_is_found(run, monkeypatch):
    engine = loop.build(run)
    direct.update(engine, 0)
    self_checks.at_first_save(engine)
    save = engine.model.save

    def careless(folder):
        save(folder)
        (file,) = (Path(folder) / "transformer").glob("*.safetensors")
        tensors = load_file(file)
        save_file({name: t * 1.01 for name, t in tensors.items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(engine.model, "save", careless)
    with pytest.raises(UserError, match="the saved model, opened again, has another velocity than the trained one"):
        self_checks.at_first_save(engine)
    assert not list(Path(run.out).glob(".tmp-*"))


def test_large_models_are_not_opened_a_second_time(run, monkeypatch):
    monkeypatch.setattr(self_checks, "RELOADED_BYTES", 0)
    engine = loop.build(run)
    monkeypatch.setattr(engine.model, "save", None)
    self_checks.at_first_save(engine)


def test_a_family_without_a_reference_is_not_compared(tiny_run):
    engine = loop.build(tiny_run())
    text, noise = engine.model.encode([engine.model.prepared[0]]), torch.zeros(1, 3, 4, 4)
    assert diffusers_reference.pipeline_latents(engine.model, engine.run.model, text, noise, 2) is None


def test_checks_run_at_start_and_once_at_the_first_save(tiny_run, monkeypatch):
    seen = []
    monkeypatch.setattr(self_checks, "at_start", lambda engine: seen.append("start"))
    monkeypatch.setattr(self_checks, "at_first_save", lambda engine: seen.append("save"))
    run = tiny_run(checkpoint_every=1)
    loop.train(run)
    assert seen == ["start", "save"]
    loop.train(replace(run, steps=6, self_checks=False), resume=True)
    assert seen == ["start", "save"]


def test_bfloat16_of_the_pipeline_is_ours(run):
    assert pipe.DTYPES.keys() == self_checks.TOLERANCE.keys()

"""The adapters against the pipelines' own `__call__`: same noise, same prompts, two samplers, one result.

Where it is hard: static and dynamic shift, VAE shift and scale, guidance, a negative prompt, two prompts of different
length, a picture that is not square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from leapalign.flow.rollout import rollout
from leapalign.models.flux import Flux
from leapalign.models.pipeline import PipelineModel
from leapalign.models.sd3 import SD3

PROMPTS = ["a red circle", "two blue star left of the green square above"]
NUM_STEPS = 7


@dataclass(frozen=True)
class Case:
    folder: str  # a fixture
    config: type
    settings: dict[str, Any]  # of our configuration; the pipeline's call takes the same names
    without_t5: bool = False


SIZE = {"height": 16, "width": 24, "max_sequence_length": 5}
CASES = {
    "sd3 guided": Case("sd3_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry photo"}),
    "sd3 guided, no negative prompt": Case("sd3_folder", SD3, {"guidance_scale": 2.0, "negative_prompt": ""}),
    "sd3 scale 1: one branch": Case("sd3_folder", SD3, {"guidance_scale": 1.0, "negative_prompt": "blurry photo"}),
    "sd3 without T5": Case("sd3_without_t5_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry"}, True),
    "sd3 without T5, no padding": Case(
        "sd3_without_t5_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "", "max_sequence_length": 0}, True
    ),
    "flux": Case("flux_folder", Flux, {"guidance_scale": 3.5}),
    "flux true guidance": Case(
        "flux_folder", Flux, {"guidance_scale": 2.0, "true_cfg_scale": 2.5, "negative_prompt": "blurry photo"}
    ),
    "flux schnell": Case("schnell_folder", Flux, {"guidance_scale": 3.5}),
}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def reference(case: Case, folder: str, output_type: str) -> Tensor:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if case.without_t5 else {}
    pipeline = (StableDiffusion3Pipeline if case.config is SD3 else FluxPipeline).from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    call = {**SIZE, **case.settings}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(PROMPTS)
    images = pipeline(
        PROMPTS, num_inference_steps=NUM_STEPS, generator=generators(), output_type=output_type, **call
    ).images
    return unpacked(images, call) if images.ndim == 3 else images


def unpacked(latents: Tensor, call: dict[str, Any]) -> Tensor:
    """FLUX returns packed latents [B, hw/4, 4C]; here by indexing, channel = 4 c + 2 dy + dx."""
    height, width = call["height"] // 2, call["width"] // 2  # the tiny VAE's factor is 2
    out = torch.empty(len(latents), latents.shape[2] // 4, height, width)
    for dy in (0, 1):
        for dx in (0, 1):
            out[:, :, dy::2, dx::2] = (
                latents[:, :, 2 * dy + dx :: 4].transpose(1, 2).reshape(len(latents), -1, height // 2, width // 2)
            )
    return out


def load(case: Case, folder: str, dtype: str = "float32") -> PipelineModel:
    return case.config(path=folder, **{**SIZE, **case.settings}).load("cpu", dtype)


@pytest.mark.parametrize("name", CASES)
def test_sampler_equals_the_pipelines_own_call(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    model = load(case, folder)
    with torch.no_grad():
        x_0 = rollout(model.velocity(model.encode(PROMPTS)), model.noise(generators()), model.sigmas(NUM_STEPS))
        images = model.decode(x_0)
    expected = reference(case, folder, "latent")
    assert x_0.shape == expected.shape == (2, 4, 8, 12)
    # measured: 2.3e-5 (SD3, whose pipeline joins the two branches in one batch) and 0 (FLUX) at a size of about 5
    assert (x_0 - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (images - reference(case, folder, "pt")).abs().max() < 1e-5
    assert expected.std() > 1 and (images[0] - images[1]).abs().max() > 0.1  # the comparison is not of constants


@pytest.mark.parametrize("name", ["sd3 guided", "flux true guidance"])
def test_every_setting_of_the_comparison_matters(name: str, request: pytest.FixtureRequest) -> None:
    """Neutral values in place of each setting change the picture: the equality above can fail."""
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    expected = reference(case, folder, "latent")
    neutral = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "negative_prompt": "", "max_sequence_length": 4}
    for setting in {*case.settings, "max_sequence_length"}:
        config = {**SIZE, **case.settings, setting: neutral[setting]}
        model = case.config(path=folder, **config).load("cpu", "float32")
        with torch.no_grad():
            x_0 = rollout(model.velocity(model.encode(PROMPTS)), model.noise(generators()), model.sigmas(NUM_STEPS))
        assert (x_0 - expected).abs().max() > 1e-2, setting


def test_grids_follow_the_shift_of_their_family(sd3_folder: str, flux_folder: str) -> None:
    """Second derivation: SD3 shifts its (already shifted) smallest time, FLUX exp(mu) by the number of image tokens."""
    shift, num_steps = 3.0, 5
    smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    even = torch.linspace(1, smallest, num_steps, dtype=torch.float64)
    sd3 = SD3(path=sd3_folder, **SIZE).load("cpu", "float32").sigmas(num_steps)
    expected = torch.cat([shift * even / (1 + (shift - 1) * even), torch.zeros(1)]).flip(0)
    torch.testing.assert_close(sd3.double(), expected, atol=1e-6, rtol=0)

    tokens = (16 // 4) * (24 // 4)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 16) / (64 - 16)
    even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    expected = torch.cat([torch.e**mu / (torch.e**mu + 1 / even - 1), torch.zeros(1)]).flip(0)
    flux = Flux(path=flux_folder, **SIZE).load("cpu", "float32").sigmas(num_steps)
    torch.testing.assert_close(flux.double(), expected, atol=1e-6, rtol=0)
    assert flux.dtype == sd3.dtype == torch.float32


def test_noise_of_a_row_is_its_generators_alone(flux_folder: str) -> None:
    model = load(CASES["flux"], flux_folder)
    both = model.noise(generators())
    assert torch.equal(both[1:], model.noise(generators()[1:]))
    assert both.dtype == torch.float32 and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["sd3 guided", "flux schnell"])
def test_bfloat16_is_close_and_keeps_float32_masters(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    exact, coarse = load(case, folder), load(case, folder, "bfloat16")
    x, sigma = exact.noise(generators()), torch.tensor(0.7)
    v, v_coarse = (m.velocity(m.encode(PROMPTS))(x, sigma) for m in (exact, coarse))
    error = (v - v_coarse).norm() / v.norm()
    assert v_coarse.dtype == torch.float32 and 1e-4 < error < 0.1  # measured 0.07 (guided), 0.02: bf16 it really is
    v_coarse.square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in coarse.policy.parameters())

"""The adapters against the pipelines' own `__call__`: same noise, same prompts, two samplers, one result.

Where it is hard: static and dynamic shift, VAE shift and scale, guidance, a negative prompt, two prompts of different
length, a picture that is not square. The largest differences stand in docs/models.md; with `-s` they are printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from leapalign.flow.rollout import rollout
from leapalign.models.diffusers_reference import pipeline_latents
from leapalign.models.flux import Flux
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.pipeline import PipelineModel
from leapalign.models.qwen_image import QwenImage
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage

PROMPTS = ["a red circle", "two blue star left of the green square above"]
# in their chat formats below and above the 32 tokens that Z-Image fills captions up to, and above what FLUX.2 is given
LONG = ["a red circle", "two blue star left of the green square above" + 4 * " and a photo of the star"]
NUM_STEPS = 7


@dataclass(frozen=True)
class Case:
    folder: str  # a fixture
    config: type
    settings: dict[str, Any]  # of our configuration; the pipeline's call takes the same names, but for `renamed`
    renamed: tuple[tuple[str, str], ...] = ()
    prompts: tuple[str, ...] = tuple(PROMPTS)
    without_t5: bool = False
    own: tuple[str, ...] = ()  # settings that the call has no name for


SIZE = {"height": 16, "width": 24, "max_sequence_length": 5}
LAYERS = (("text_layers", "text_encoder_out_layers"),)
CFG = (("guidance_scale", "true_cfg_scale"),)


def flux2(folder: str, **settings: Any) -> Case:
    common = {"max_sequence_length": 24, "text_layers": (1, 2, 4)}
    return Case(folder, Flux2Klein, common | settings, LAYERS, tuple(LONG))


def qwen(**settings: Any) -> Case:
    return Case("qwen_image_folder", QwenImage, {"max_sequence_length": 30} | settings, CFG, tuple(LONG))


def z_image(**settings: Any) -> Case:
    return Case("z_image_folder", ZImage, {"max_sequence_length": 40} | settings, prompts=tuple(LONG))


CASES = {
    "sd3 guided": Case("sd3_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry photo"}),
    "sd3 guided, no negative prompt": Case("sd3_folder", SD3, {"guidance_scale": 2.0, "negative_prompt": ""}),
    "sd3 scale 1: one branch": Case("sd3_folder", SD3, {"guidance_scale": 1.0, "negative_prompt": "blurry photo"}),
    "sd3 without T5": Case(
        "sd3_without_t5_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry"}, without_t5=True
    ),
    "sd3 without T5, no padding": Case(
        "sd3_without_t5_folder",
        SD3,
        {"guidance_scale": 3.5, "negative_prompt": "", "max_sequence_length": 0},
        without_t5=True,
    ),
    "sd3 shifted once": Case("sd3_folder", SD3, {"guidance_scale": 2.0, "shift": "once"}, own=("shift",)),
    "sd3-m": Case("sd3_m_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry photo"}),
    "sd3.5-l": Case("sd35_l_folder", SD3, {"guidance_scale": 3.5, "negative_prompt": "blurry photo"}),
    "flux": Case("flux_folder", Flux, {"guidance_scale": 3.5}),
    "flux true guidance": Case(
        "flux_folder", Flux, {"guidance_scale": 2.0, "true_cfg_scale": 2.5, "negative_prompt": "blurry photo"}
    ),
    "flux krea": Case("flux_folder", Flux, {"guidance_scale": 4.5}),  # dev's layout at its own guidance
    "flux schnell": Case("schnell_folder", Flux, {"guidance_scale": 3.5}),
    "flux2 guided": flux2("flux2_folder", guidance_scale=3.5),
    "flux2 negative prompt": flux2("flux2_folder", guidance_scale=3.5, negative_prompt="blurry photo"),
    "flux2 distilled": flux2("flux2_distilled_folder", guidance_scale=3.5),
    "qwen-image guided": qwen(guidance_scale=3.5, negative_prompt="blurry photo"),
    "qwen-image scale 1: one branch": qwen(guidance_scale=1.0, negative_prompt="blurry photo"),
    "z-image guided": z_image(guidance_scale=2.5, negative_prompt="blurry photo"),
    "z-image truncated and limited": z_image(
        guidance_scale=2.5, negative_prompt="blurry photo", cfg_truncation=0.3, cfg_normalization=1.0
    ),
    "z-image without guidance": z_image(guidance_scale=0.0, negative_prompt="blurry photo"),
}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def reference(case: Case, folder: str, output_type: str) -> Tensor:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if case.without_t5 else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(case.prompts)  # copies throughout: ZImagePipeline writes its chat format into the caller's list
    call = SIZE | case.settings | {new: case.settings[old] for old, new in case.renamed}
    call = {name: value for name, value in call.items() if name not in dict(case.renamed)}
    if case.settings.get("shift") == "once":
        call["sigmas"] = [1 - i / NUM_STEPS for i in range(NUM_STEPS)]
    call = {name: value for name, value in call.items() if name not in case.own}
    negative = call.pop("negative_prompt", None)
    if case.config is Flux2Klein:  # it takes a negative prompt as embeddings only
        text = {name: call[name] for name in ("max_sequence_length", "text_encoder_out_layers")}
        call["negative_prompt_embeds"] = pipeline.encode_prompt([negative or ""] * 2, **text)[0]
    elif negative is not None:
        call["negative_prompt"] = [negative] * len(prompts)
    images = pipeline(
        prompt=prompts, num_inference_steps=NUM_STEPS, generator=generators(), output_type=output_type, **call
    ).images
    return unpacked(images, call) if images.ndim == 3 else images


def unpacked(latents: Tensor, call: dict[str, Any]) -> Tensor:
    """FLUX and Qwen-Image return packed latents [B, hw/4, 4C]; here by indexing, channel = 4 c + 2 dy + dx."""
    height, width = call["height"] // 2, call["width"] // 2  # the tiny VAE's factor is 2
    out = torch.empty(len(latents), latents.shape[2] // 4, height, width)
    for dy in (0, 1):
        for dx in (0, 1):
            out[:, :, dy::2, dx::2] = (
                latents[:, :, 2 * dy + dx :: 4].transpose(1, 2).reshape(len(latents), -1, height // 2, width // 2)
            )
    return out


def as_pipeline(case: Case, model: PipelineModel, x_0: Tensor) -> Tensor:
    """FLUX.2 returns the VAE's latents: batch norm undone, patches unpacked; here by indexing."""
    if case.config is not Flux2Klein:
        return x_0
    bn = model.decoder.vae.bn
    z = x_0 * (bn.running_var + 1e-4)[:, None, None].sqrt() + bn.running_mean[:, None, None]
    out = torch.empty(len(z), z.shape[1] // 4, 2 * z.shape[2], 2 * z.shape[3])
    for dy in (0, 1):
        for dx in (0, 1):
            out[:, :, dy::2, dx::2] = z[:, 2 * dy + dx :: 4]
    return out


def load(case: Case, folder: str, dtype: str = "float32", **changes: Any) -> PipelineModel:
    return case.config(path=folder, **(SIZE | case.settings | changes)).load("cpu", dtype)


def sample(case: Case, model: PipelineModel, rows: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        velocity = model.velocity(model.encode(case.prompts[rows]))
        return rollout(velocity, model.noise(generators()[rows]), model.sigmas(NUM_STEPS))


def around_our_components(case: Case, folder: str, model: PipelineModel) -> Tensor:
    """The pipeline's call with our encoded prompts and noise: what a run compares itself with as it starts."""
    config = case.config(path=folder, **(SIZE | case.settings))
    theirs = pipeline_latents(model, config, model.encode(case.prompts), model.noise(generators()), NUM_STEPS)
    assert theirs is not None
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_sampler_equals_the_pipelines_own_call(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    model = load(case, folder)
    x_0 = sample(case, model)
    images, latents = model.decode(x_0), as_pipeline(case, model, x_0)
    expected, pixels = reference(case, folder, "latent"), reference(case, folder, "pt")
    assert latents.shape == expected.shape == (2, 4, 8, 12)
    differences = (latents - expected).abs().max(), (images - pixels).abs().max()
    print(
        f"{name}: latents {differences[0]:.1e} (at a size of {expected.abs().max():.1f}), images {differences[1]:.1e}"
    )
    # not exactly 0 where the pipeline joins the two branches in one batch (SD3, Z-Image) or pads prompts (Qwen-Image)
    assert differences[0] < 1e-5 * expected.abs().max() and differences[1] < 1e-5
    theirs = around_our_components(case, folder, model)
    assert theirs.shape == x_0.shape and (theirs - x_0).abs().max() < 2e-5 * x_0.abs().max()
    assert expected.std() > 1 and (images[0] - images[1]).abs().max() > 0.1  # the comparison is not of constants


NEUTRAL: dict[str, Any] = {
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "negative_prompt": "",
    "max_sequence_length": 4,
    "text_layers": (2, 1, 4),
    "cfg_truncation": 1.0,
    "cfg_normalization": 0.0,
}
HARD = [
    "sd3 guided",
    "flux true guidance",
    "flux2 negative prompt",
    "qwen-image guided",
    "z-image truncated and limited",
]


@pytest.mark.parametrize("name", HARD)
def test_every_setting_of_the_comparison_matters(name: str, request: pytest.FixtureRequest) -> None:
    """Neutral values in place of each setting change the picture: the equality above can fail."""
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    expected = sample(case, load(case, folder))  # which is the pipeline's, by the test above
    for setting in {*case.settings, "max_sequence_length"}:
        x_0 = sample(case, load(case, folder, **{setting: NEUTRAL[setting]}))
        assert (x_0 - expected).abs().max() > 1e-2, setting


@pytest.mark.parametrize("name", ["flux2 guided", "qwen-image guided", "z-image truncated and limited"])
def test_a_row_alone_is_the_row_in_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    """Whatever the neighbour's length: padding does not matter."""
    case = CASES[name]
    model = load(case, request.getfixturevalue(case.folder))
    together = sample(case, model)
    for row in (0, 1):
        alone = sample(case, model, slice(row, row + 1))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=2e-5 * float(together.abs().max()))


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


@pytest.mark.parametrize("name", ["sd3 guided", "flux", "flux schnell", "flux2 guided", "z-image guided"])
def test_the_grid_of_one_step_is_the_schedulers_where_that_is_a_number(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = load(CASES[name], request.getfixturevalue(CASES[name].folder))
    torch.testing.assert_close(model.grid(1).flip(0), model.sigmas(1), rtol=0, atol=1e-6)


def test_noise_of_a_row_is_its_generators_alone(flux_folder: str) -> None:
    model = load(CASES["flux"], flux_folder)
    both = model.noise(generators())
    assert torch.equal(both[1:], model.noise(generators()[1:]))
    assert both.dtype == torch.float32 and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["sd3 guided", "flux schnell", "flux2 guided", "qwen-image guided", "z-image guided"])
def test_bfloat16_is_close_and_keeps_float32_masters(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    prompts = case.prompts
    folder = request.getfixturevalue(case.folder)
    exact, coarse = load(case, folder), load(case, folder, "bfloat16")
    # 0.5 and 500 are bfloat16 numbers; FLUX and Qwen-Image round their time, which here could change v by a third
    x, sigma = exact.noise(generators()), torch.tensor(0.5)
    v, v_coarse = (m.velocity(m.encode(prompts))(x, sigma) for m in (exact, coarse))
    error = (v - v_coarse).norm() / v.norm()
    assert v_coarse.dtype == torch.float32 and 1e-4 < error < 0.1  # measured 0.01 to 0.04: bf16 it really is
    v_coarse.square().sum().backward()
    parameters = [p for p in coarse.policy.parameters() if p.grad is not None]  # Qwen-Image has some without
    assert parameters and all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in parameters)
    assert all(p.dtype == torch.float32 for p in coarse.policy.parameters())

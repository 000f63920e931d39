"""What every model keeps. The folder is the list: a new file in models/ without a fixture here fails."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leapalign.models
import tiny_pipelines as tiny
from leapalign.flow.rollout import rollout
from leapalign.lookup.sources import config_for
from leapalign.models.flux import Flux
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.pipeline import PipelineModel
from leapalign.models.prompt_embeds import store as prompt_store
from leapalign.models.qwen_image import QwenImage
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage
from leapalign.verification.pipelines import Trial, check_pipeline

HELPERS = {
    "base",
    "prompt_embeds",
    "decode",
    "guidance",
    "pipeline",
    "published",
    "text_readers",
    "diffusers_reference",
}
PROMPTS = ["a red circle", "two blue star left of the green square above" + 3 * " and a photo of the square"]
SIZE: dict[str, Any] = {"height": 16, "width": 24, "max_sequence_length": 5, "decode_chunk": 1}
CHAT: dict[str, Any] = SIZE | {"max_sequence_length": 48}  # room for the second prompt in its chat format


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], Any]  # a tiny diffusers pipeline
    config: Callable[[str], Any]  # folder -> configuration
    without_gradient: tuple[str, ...] = ()  # ends of names; each explained in the file's docstring and docs/models.md


# The last SD3 block computes text queries and drops them, so what makes them cannot matter.
UNUSED_QUERIES = ("1.attn.add_q_proj.weight", "1.attn.add_q_proj.bias", "1.attn.norm_added_q.weight")
# Qwen-Image's drops its whole text stream: all that is behind the keys and values of that stream.
UNUSED_TEXT = (
    *UNUSED_QUERIES,
    *(
        f"1.{part}.{kind}"
        for part in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        for kind in ("weight", "bias")
    ),
)
CASES = {
    "sd3": Case(
        tiny.sd3_pipeline, lambda folder: SD3(path=folder, guidance_scale=3.0, **SIZE), without_gradient=UNUSED_QUERIES
    ),
    "sd3 without T5": Case(
        lambda: tiny.sd3_pipeline(with_t5=False),
        lambda folder: SD3(path=folder, guidance_scale=1.0, **SIZE),
        without_gradient=UNUSED_QUERIES,
    ),
    "flux": Case(tiny.flux_pipeline, lambda folder: Flux(path=folder, **SIZE)),
    "flux schnell": Case(
        lambda: tiny.flux_pipeline(guidance_embeds=False), lambda folder: Flux(path=folder, true_cfg_scale=2.0, **SIZE)
    ),
    "sd3-m": Case(
        lambda: tiny.sd3_pipeline(dual=(), qk_norm=None),
        lambda folder: SD3(path=folder, guidance_scale=3.0, **SIZE),
        without_gradient=UNUSED_QUERIES,
    ),
    "flux2": Case(tiny.flux2_pipeline, lambda folder: Flux2Klein(path=folder, text_layers=(1, 2, 4), **CHAT)),
    "flux2 distilled": Case(
        lambda: tiny.flux2_pipeline(distilled=True),
        lambda folder: Flux2Klein(path=folder, text_layers=(1, 2, 4), **CHAT),
    ),
    "qwen-image": Case(
        tiny.qwen_image_pipeline, lambda folder: QwenImage(path=folder, **CHAT), without_gradient=UNUSED_TEXT
    ),
    "z-image": Case(
        tiny.z_image_pipeline, lambda folder: ZImage(path=folder, guidance_scale=2.0, cfg_normalization=1.0, **CHAT)
    ),
    "z-image turbo": Case(tiny.z_image_pipeline, lambda folder: ZImage(path=folder, guidance_scale=0.0, **CHAT)),
}


def families() -> dict[str, set[str]]:
    """file -> names of the configuration classes in it."""
    found = {}
    for file in {module.name for module in pkgutil.iter_modules(leapalign.models.__path__)} - HELPERS:
        module = importlib.import_module(f"leapalign.models.{file}")
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        found[file] = {c.__name__ for c in classes if hasattr(c, "load")}
    return found


def test_every_family_has_a_fixture() -> None:
    covered = {type(case.config("somewhere")).__name__ for case in CASES.values()}
    for file, classes in families().items():
        assert classes, f"models/{file}.py holds no configuration with load(); if it is a helper, list it in HELPERS"
        assert classes <= covered, f"models/{file}.py: no contract fixture for {classes - covered}"


@pytest.mark.parametrize("name", CASES)
def test_configuration_is_a_frozen_keyword_dataclass(name: str) -> None:
    config = CASES[name].config("somewhere")
    assert dataclasses.is_dataclass(config) and config.name
    assert all(field.kw_only for field in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.path = "elsewhere"


@pytest.fixture(scope="module", params=CASES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, PipelineModel]:
    case = CASES[request.param]
    folder = tiny.save(case.build(), tmp_path_factory.mktemp("contract"))
    model = case.config(folder).load("cpu", "float32")
    model.prepare(PROMPTS)
    return case, model


def test_second_load_takes_its_prompts_from_disk(
    loaded: tuple[Case, PipelineModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and the text encoders are never loaded."""
    case, model = loaded
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(prompt_store, "WORTHWHILE", 0)
    config = case.config(str(model.folder.path))
    config.load("cpu", "float32").prepare(PROMPTS)
    second = config.load("cpu", "float32")
    monkeypatch.setattr(second.prompts, "_load_encoder", lambda: pytest.fail("the text encoders are loaded again"))
    again, encoded = second.encode(PROMPTS), model.encode(PROMPTS)
    for a, b in ((again.prompts, encoded.prompts), (again.negative, encoded.negative)):
        if a is None or b is None:
            assert a is b
            continue
        for name in ("tokens", "pooled", "mask"):
            stored, made = getattr(a, name), getattr(b, name)
            assert (stored is made is None) or torch.equal(stored, made)


def test_its_pipelines_folder_is_recognised(loaded: tuple[Case, PipelineModel]) -> None:
    case, model = loaded
    assert type(config_for(str(model.folder.path), {})) is type(case.config("somewhere"))


def test_verify_finds_its_sampler_equal_to_the_pipelines_own(loaded: tuple[Case, PipelineModel]) -> None:
    case, model = loaded
    trial = Trial(prompt="a red circle", num_steps=2, size=16, seed=1, device="cpu")
    checks = check_pipeline(case.config(str(model.folder.path)), trial, None)
    assert not [check for check in checks if check.state == "different"]
    assert {"opens", "latents, ours and the pipeline's own"} <= {check.check for check in checks}


def noise(model: PipelineModel) -> Tensor:
    return model.noise([torch.Generator().manual_seed(seed) for seed in (3, 4)])


def sample(model: PipelineModel, num_steps: int = 3) -> Tensor:
    with torch.no_grad():
        return rollout(model.velocity(model.encode(PROMPTS)), noise(model), model.sigmas(num_steps))


def test_shapes_and_dtypes(loaded: tuple[Case, PipelineModel]) -> None:
    _, model = loaded
    x = noise(model)
    assert x.shape == (2, *model.latent_shape) and x.dtype == torch.float32
    v = model.velocity(model.encode(PROMPTS))(x, torch.tensor(0.5))
    assert v.shape == x.shape and v.dtype == torch.float32 and v.isfinite().all()
    assert model.decode(x).shape == (2, 3, 16, 24)


def test_grid_ascends_from_image_to_noise(loaded: tuple[Case, PipelineModel]) -> None:
    _, model = loaded
    for num_steps in (1, 4, 10):
        sigmas = model.sigmas(num_steps)
        assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float32
        assert sigmas[0] == 0 and sigmas[-1] == pytest.approx(1) and (sigmas.diff() > 0).all()
    assert torch.equal(model.sigmas(4), model.sigmas(4))  # no state is left by the call in between


def test_determinism(loaded: tuple[Case, PipelineModel]) -> None:
    _, model = loaded
    first = sample(model)
    torch.rand(7)  # the global generator plays no part
    assert torch.equal(first, sample(model)) and torch.equal(model.decode(first), model.decode(first))


def test_rows_do_not_see_each_other(loaded: tuple[Case, PipelineModel]) -> None:
    _, model = loaded
    x, sigma = noise(model), torch.tensor(0.5)
    together = model.velocity(model.encode(PROMPTS))(x, sigma)
    alone = model.velocity(model.encode(PROMPTS[1:]))(x[1:], sigma)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    swapped = model.velocity(model.encode(PROMPTS[::-1]))(x, sigma)
    assert (swapped - together).abs().max() > 1e-2  # and the prompt matters


def test_gradient_reaches_every_parameter_but_the_listed(loaded: tuple[Case, PipelineModel]) -> None:
    case, model = loaded
    x = noise(model).requires_grad_()
    model.policy.zero_grad()
    v = model.velocity(model.encode(PROMPTS))(x, torch.tensor(0.5))
    (v * torch.randn(v.shape)).sum().backward()
    assert x.grad is not None and (x.grad != 0).all()
    unreached = {n for n, p in model.policy.named_parameters() if p.grad is None or not p.grad.any()}
    listed = {n for n, _ in model.policy.named_parameters() if n.endswith(case.without_gradient or ("-",))}
    assert unreached == listed
    model.policy.zero_grad()


def test_decode_is_in_range_and_does_not_depend_on_the_chunk(loaded: tuple[Case, PipelineModel]) -> None:
    _, model = loaded
    z = 3 * torch.randn(3, *model.latent_shape)
    images = model.decode(z)
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1  # both bounds are met here
    whole = dataclasses.replace(model.decoder, chunk=0)
    torch.testing.assert_close(whole(z), images, rtol=0, atol=1e-5)
    gradients = []
    for decode in (model.decode, whole):
        leaf = z.clone().requires_grad_()
        decode(leaf).square().sum().backward()
        assert leaf.grad is not None and (leaf.grad != 0).all()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_save_and_reload_give_the_same_velocity(loaded: tuple[Case, PipelineModel], tmp_path: Path) -> None:
    case, model = loaded
    weights = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    x, sigma = noise(model), torch.tensor(0.5)
    base = model.velocity(model.encode(PROMPTS))(x, sigma)
    try:
        with torch.no_grad():
            for p in model.policy.parameters():
                p.mul_(1.01)
        model.save(tmp_path / "tuned")
        trained = model.velocity(model.encode(PROMPTS))(x, sigma)
    finally:
        model.policy.load_state_dict(weights, strict=False)
    again = case.config(str(tmp_path / "tuned")).load("cpu", "float32")
    assert torch.equal(again.velocity(again.encode(PROMPTS))(x, sigma), trained)
    assert torch.equal(again.decode(x), model.decode(x))
    assert not torch.allclose(trained, base)

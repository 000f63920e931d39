"""What FLUX.2, Qwen-Image and Z-Image have of their own: guidance and its gradient, decoding, grids, text, mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.flow.graph import inputs_only
from leapalign.flow.rollout import rollout
from leapalign.lookup.sources import config_for
from leapalign.models.base import Conditioning, Text
from leapalign.models.flux2 import Flux2Klein
from leapalign.models.guidance import Guidance, GuidedVelocity, linear
from leapalign.models.pipeline import PipelineModel
from leapalign.models.qwen_image import QwenImage, renormalised
from leapalign.models.sd3 import SD3
from leapalign.models.z_image import ZImage, limited

PROMPTS = ["a red circle", "two blue star left of the green square above" + 3 * " and a photo of the square"]
SIZE: dict[str, Any] = {"height": 16, "width": 24, "max_sequence_length": 48, "negative_prompt": "blurry"}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {  # fixture's name -> configuration
    "flux2": (Flux2Klein, {"text_layers": (1, 2, 4), "guidance_scale": 2.5}),
    "qwen_image": (QwenImage, {"guidance_scale": 2.5}),
    "z_image": (ZImage, {"guidance_scale": 1.5, "cfg_normalization": 0.9}),
}


def load(folder: str | Path, family: str, dtype: str = "float32", **changes: Any) -> PipelineModel:
    config, own = FAMILIES[family]
    return config(path=str(folder), **(SIZE | own | changes)).load("cpu", dtype)


def noise(model: PipelineModel) -> Tensor:
    return model.noise([torch.Generator().manual_seed(seed) for seed in (3, 4)])


def branches(model: PipelineModel, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The two forwards without what is made of them."""
    conditioning = model.encode(PROMPTS)
    assert conditioning.negative is not None
    texts = conditioning.prompts, conditioning.negative.expand(len(x))
    p, n = (model.predict(model.policy, x, sigma, text) for text in texts)
    return p, n


# ---- guidance that is more than a line


def pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, n = torch.randn(2, 2, 3, 4, 6, dtype=dtype, generator=generator)
    return p.requires_grad_(), n.requires_grad_()


def test_renormalised_has_the_prompts_norm_in_every_token() -> None:
    """Against loops over the tokens: 2 x 2 latents of all channels each."""
    p, n = (t.detach() for t in pair(0))
    v = renormalised(p, n, 3.5)
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            token = (slice(None), slice(None), slice(i, i + 2), slice(j, j + 2))
            for row in (0, 1):
                w = n[token][row] + 3.5 * (p[token][row] - n[token][row])
                expected = w * (p[token][row].square().sum() / w.square().sum()).sqrt()
                torch.testing.assert_close(v[token][row], expected)
    assert (v - linear(p, n, 3.5)).abs().max() > 1  # and it is not the line


def test_limited_shortens_what_is_too_long_and_nothing_else() -> None:
    p, n = (t.detach() for t in pair(1))
    w = p + 2.0 * (p - n)
    norm, own = (t.flatten(1).norm(dim=1) for t in (w, p))
    assert torch.equal(limited(p, n, 2.0, most=0.0), w) and torch.equal(limited(p, n, 2.0, most=1e3), w)
    most = float((norm / own).mean())  # between the two rows' own ratios: one is too long, one is not
    short = limited(p, n, 2.0, most=most)
    for row in (0, 1):
        factor = most * own[row] / norm[row] if norm[row] > most * own[row] else 1.0
        torch.testing.assert_close(short[row], w[row] * factor)
    assert (norm > most * own).tolist() in ([True, False], [False, True])


@pytest.mark.parametrize(
    "combine",
    [
        lambda p, n: renormalised(p, n, 3.5),
        lambda p, n: limited(p, n, 2.0, most=1.0),
        lambda p, n: limited(p, n, 2.0, most=1e3),
    ],
    ids=["renormalised", "limited", "limited, but long enough"],
)
def test_gradient_against_finite_differences(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    """float64, with respect to both branches."""
    assert torch.autograd.gradcheck(combine, pair(2))


@pytest.mark.parametrize("through_both", [True, False])
def test_guided_gradient_against_finite_differences(through_both: bool) -> None:
    """A network of one weight; without the negative branch's gradient, that branch stays where it was."""
    generator = torch.Generator().manual_seed(3)
    x, g = torch.randn(2, 1, 3, 4, 6, dtype=torch.float64, generator=generator)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def predict(x: Tensor, sigma: Tensor, text: Text, weight: Tensor = w) -> Tensor:
        return torch.tanh(weight * x * text.tokens[:, 0, 0, None, None, None] + x.flip(3))

    def text(value: float) -> Text:
        return Text(torch.full((1, 1, 1), value, dtype=torch.float64))

    sigma, step = torch.tensor(0.5), 1e-6
    guidance = Guidance(3.5, through_both, "", combine=renormalised)
    v = GuidedVelocity(predict, Conditioning(text(2.0), text(-1.0)), guidance)(x, sigma)
    (gradient,) = torch.autograd.grad(v, w, g)

    def moved(by: float) -> float:
        weight = w.detach() + by
        n = predict(x, sigma, text(-1.0), weight if through_both else w.detach())
        return (renormalised(predict(x, sigma, text(2.0), weight), n, 3.5) * g).sum().item()

    assert gradient.item() == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-7)


@pytest.mark.parametrize("cfg_grad", ["both", "cond"])
def test_renormalised_gradient_by_hand_on_the_model(cfg_grad: str, qwen_image_folder: str) -> None:
    """v = c |p| / |c|, c = n + s (p - n). With u = c / |c| and the gradient g at v, token by token:

    at c: |p| / |c| (g - u (u g)), at p: s times that + (u g) p / |p|, at n: (1 - s) times that, or nothing.
    """
    model = load(qwen_image_folder, "qwen_image", cfg_grad=cfg_grad, guidance_scale=3.5)
    x, sigma, s = noise(model), torch.tensor(0.6), 3.5
    p, n = branches(model, x, sigma)
    g = torch.randn(p.shape)

    def tokens(t: Tensor) -> Tensor:  # [B, C, h, w] -> [B, h/2, w/2, 4C]
        return t.reshape(2, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)

    def latents(t: Tensor) -> Tensor:
        return t.reshape(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 12)

    pt, nt, gt = tokens(p.detach()), tokens(n.detach()), tokens(g)
    c = nt + s * (pt - nt)
    length, own = c.norm(dim=-1, keepdim=True), pt.norm(dim=-1, keepdim=True)
    along = (c / length * gt).sum(-1, keepdim=True)
    at_c = own / length * (gt - c / length * along)
    at_p, at_n = s * at_c + along * pt / own, (1 - s) * at_c
    weights = list(model.policy.parameters())

    def gradient(output: Tensor, cotangent: Tensor) -> Tensor:
        parts = torch.autograd.grad(output, weights, cotangent, allow_unused=True, retain_graph=True)
        return torch.cat([(torch.zeros_like(w) if d is None else d).flatten() for w, d in zip(weights, parts)])

    expected = gradient(p, latents(at_p)) + (gradient(n, latents(at_n)) if cfg_grad == "both" else 0)
    v = model.velocity(model.encode(PROMPTS))(x, sigma)
    torch.testing.assert_close(v.detach(), latents(c * own / length), rtol=1e-5, atol=1e-5)
    found = gradient(v, g)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - gradient(p, g)).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_value_bit_for_bit_through_both_branches_and_one(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    both, cond = (load(folder, family, cfg_grad=cfg_grad) for cfg_grad in ("both", "cond"))
    x, sigma = noise(both), torch.tensor(0.6)
    values, gradients = [], []
    for model in (both, cond):
        v = model.velocity(model.encode(PROMPTS))(x, sigma)
        (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(5))).sum().backward()  # |v| is |p| here
        values.append(v.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None]))
    assert torch.equal(*values)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()


def forwards(model: PipelineModel, sigma: float) -> int:
    calls: list[int] = []
    hook = model.policy.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.velocity(model.encode(PROMPTS))(noise(model), torch.tensor(sigma))
    hook.remove()
    return len(calls)


def test_z_image_guides_while_one_minus_sigma_is_at_most_the_truncation(z_image_folder: str) -> None:
    model = load(z_image_folder, "z_image", cfg_truncation=0.25)
    assert [forwards(model, sigma) for sigma in (1.0, 0.8, 0.75, 0.7499, 0.1)] == [2, 2, 2, 1, 1]
    assert forwards(load(z_image_folder, "z_image"), 0.001) == 2  # 1: in every step
    assert forwards(load(z_image_folder, "z_image", guidance_scale=0.5), 0.5) == 2  # below 1 is guidance, too
    assert forwards(load(z_image_folder, "z_image", guidance_scale=0.0), 0.5) == 1


def test_distilled_flux2_has_one_branch(flux2_folder: str, flux2_distilled_folder: str) -> None:
    assert [forwards(load(folder, "flux2"), 0.5) for folder in (flux2_folder, flux2_distilled_folder)] == [2, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_settings_agree(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(f"{family}_folder"), family, dtype)
    found = []
    for blocks, inputs in ((False, False), (True, False), (False, True)):
        model.policy.zero_grad()
        (model.policy.enable_gradient_checkpointing if blocks else model.policy.disable_gradient_checkpointing)()  # type: ignore[operator]
        velocity = model.velocity(model.encode(PROMPTS))
        x_0 = rollout(inputs_only(velocity) if inputs else velocity, noise(model), model.sigmas(3), graph_steps=2)
        x_0.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
        found.append((x_0.detach(), gradient))
    for x_0, gradient in found[1:]:
        assert torch.equal(x_0, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


# ---- decoding


def test_qwen_decode_is_the_vaes_own_without_its_cache_and_clamp(qwen_image_folder: str) -> None:
    """Value and gradient against `vae.decode`, which has both; beyond its clamp only ours has a gradient."""
    decoder = load(qwen_image_folder, "qwen_image").decoder
    z = (3 * torch.randn(2, 4, 8, 12)).requires_grad_()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in ([-0.7, 0.1, 1.5, 0.4], [2.8, 0.6, 1.2, 1.9]))
    own = decoder.vae.decode(z[:, :, None] * std + mean).sample[:, :, 0]
    inside = own.detach().abs() < 1
    assert 0.1 < inside.float().mean() < 0.95
    images = decoder(z)
    torch.testing.assert_close(images, own / 2 + 0.5, rtol=0, atol=5e-6)
    g = torch.randn(own.shape)
    (expected,) = torch.autograd.grad(own / 2, z, g, retain_graph=True)
    (found,) = torch.autograd.grad(images, z, g * inside)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (all_pixels,) = torch.autograd.grad(decoder(z), z, g)
    assert (all_pixels - expected).abs().max() > 0.1 * expected.abs().max()


def test_qwen_decode_keeps_no_state_between_forward_and_backward(qwen_image_folder: str) -> None:
    decoder = load(qwen_image_folder, "qwen_image").decoder
    z = torch.randn(3, 4, 8, 12)
    gradients = []
    for disturb in (False, True):
        leaf = z.clone().requires_grad_()
        images = decoder(leaf)
        if disturb:  # what the VAE's cache would have been filled with
            decoder.vae.decode(torch.randn(1, 4, 1, 8, 12))
            decoder.vae._feat_map = [torch.randn(1)] * 20
        images.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# ---- grids


def test_qwen_grid_ends_at_the_terminal_sigma_and_has_one_step(qwen_image_folder: str) -> None:
    """Second derivation: exp(mu) shift, then 1 - sigma stretched so that the last sigma is 0.02."""
    model = load(qwen_image_folder, "qwen_image")
    mu = 0.5 + (0.9 - 0.5) * (24 - 16) / (64 - 16)
    even = torch.linspace(1, 1 / 5, 5, dtype=torch.float64)
    shifted = torch.e**mu / (torch.e**mu + 1 / even - 1)
    stretched = 1 - (1 - shifted) * (1 - 0.02) / (1 - shifted[-1])
    expected = torch.cat([stretched, torch.zeros(1)]).flip(0)
    torch.testing.assert_close(model.sigmas(5).double(), expected, atol=1e-6, rtol=0)
    assert model.sigmas(1).tolist() == [0, 1]


def test_flux2_grid_follows_the_empirical_mu(flux2_folder: str) -> None:
    """Two lines in the number of image tokens, at 10 and at 200 steps; between them straight."""
    tokens, steps = 24, 50
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    mu = at_10 + (at_200 - at_10) * (steps - 10) / 190
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    expected = torch.cat([torch.e**mu / (torch.e**mu + 1 / even - 1), torch.zeros(1)]).flip(0)
    sigmas = load(flux2_folder, "flux2").sigmas(steps)
    torch.testing.assert_close(sigmas.double(), expected, atol=1e-6, rtol=0)


def test_z_image_grid_static_and_dynamic(z_image_folder: str, tmp_path: Path) -> None:
    even = torch.linspace(1, 1 / 5, 5, dtype=torch.float64)
    static = torch.cat([3 * even / (1 + 2 * even), torch.zeros(1)]).flip(0)
    torch.testing.assert_close(load(z_image_folder, "z_image").sigmas(5).double(), static, atol=1e-6, rtol=0)
    folder = Path(shutil.copytree(z_image_folder, tmp_path / "dynamic"))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (24 - 16) / (64 - 16)
    dynamic = torch.cat([torch.e**mu / (torch.e**mu + 1 / even - 1), torch.zeros(1)]).flip(0)
    torch.testing.assert_close(load(folder, "z_image").sigmas(5).double(), dynamic, atol=1e-6, rtol=0)


# ---- text


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_before_whatever_is_encoded_with_them(
    family: str, request: pytest.FixtureRequest
) -> None:
    """Bit for bit: what a resumed run and an evaluation rely on."""
    folder = request.getfixturevalue(f"{family}_folder")
    first, second = load(folder, family), load(folder, family)
    first.prepare([*(f"{n} circle" for n in range(3)), *PROMPTS])
    second.prepare(PROMPTS[:1])
    a, b = (model.encode(PROMPTS).prompts for model in (first, second))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens[0], a.tokens[1])
    alone = second.encode(PROMPTS[:1]).prompts
    if family == "flux2":  # always full, the padding counts
        assert alone.mask is None and alone.tokens.shape[1] == 48
    else:
        assert a.mask is not None and alone.mask is not None and alone.mask.all()
        assert a.mask.sum(1).tolist() == [alone.tokens.shape[1], a.tokens.shape[1]]
        assert torch.equal(a.tokens[0, : alone.tokens.shape[1]], alone.tokens[0])


def test_qwen_images_system_prompt_has_the_tokens_that_the_pipeline_drops() -> None:
    """So that the tiny pipeline sees the prompt and not the rest of the system prompt."""
    from diffusers import QwenImagePipeline

    from tiny_pipelines import qwen_tokenizer

    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)  # type: ignore[arg-type]
    head = pipeline.prompt_template_encode.split("{}")[0]
    assert len(qwen_tokenizer()(head).input_ids) == pipeline.prompt_template_encode_start_idx == 34


# ---- folders and settings that cannot work


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("flux2", {"text_layers": (1, 2)}, "2 layers of 16 features, the transformer takes 48; give 3 of them"),
        ("flux2", {"text_layers": (9, 18, 27)}, r"text_layers \[9, 18, 27\]: the text encoder has 4 layers"),
        ("flux2", {"max_sequence_length": 0}, "expected 1 to 512"),
        ("flux2", {"height": 18}, "height 18 is not a positive multiple of 4"),
        ("qwen_image", {"max_sequence_length": 1025}, "expected 1 to 1024"),
        ("qwen_image", {"width": 18}, "width 18 is not a positive multiple of 4"),
        ("z_image", {"max_sequence_length": 97}, r"max_sequence_length 97: expected 1 to 96 \(the model's position"),
        ("z_image", {"width": 4 * 33}, "width: 33 tokens are beyond the model's position table of 32"),
        ("z_image", {"cfg_truncation": 1.5}, "cfg_truncation 1.5: expected 0 to 1"),
        ("z_image", {"cfg_normalization": -1.0}, "cfg_normalization -1.0: expected a positive number"),
        ("z_image", {"height": 18}, "height 18 is not a positive multiple of 4"),
    ],
)
def test_settings_that_cannot_work(
    family: str, changes: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=message):
        load(request.getfixturevalue(f"{family}_folder"), family, **changes)


def test_longest_text_and_widest_picture_still_work(z_image_folder: str) -> None:
    model = load(z_image_folder, "z_image", max_sequence_length=96, width=4 * 32)
    with torch.no_grad():
        v = model.velocity(model.encode([" ".join(["red"] * 200)] * 2))(noise(model), torch.tensor(0.5))
    assert v.isfinite().all() and v.shape[3] == 64


@pytest.mark.parametrize(("family", "vae"), [("flux2", "AutoencoderKLFlux2"), ("qwen_image", "AutoencoderKLQwenImage")])
def test_a_vae_of_another_class_is_refused(
    family: str, vae: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"{family}_folder"), tmp_path / "copy"))
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UserError, match=f"its VAE is a AutoencoderKL, expected {vae}"):
        load(folder, family)


@pytest.mark.parametrize("family", ["flux2", "z_image"])
def test_a_tokenizer_without_chat_template_is_refused(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"{family}_folder"), tmp_path / "copy"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(folder, family).encode(PROMPTS)


def test_a_folder_is_opened_by_its_own_family(
    flux2_folder: str, qwen_image_folder: str, z_image_folder: str, sd3_folder: str
) -> None:
    folders = {flux2_folder: Flux2Klein, qwen_image_folder: QwenImage, z_image_folder: ZImage, sd3_folder: SD3}
    assert {folder: type(config_for(folder, {})) for folder in folders} == folders
    with pytest.raises(UserError, match="holds a ZImagePipeline, expected a QwenImagePipeline"):
        load(z_image_folder, "qwen_image")


def test_a_distilled_pipeline_saved_by_us_is_still_distilled(flux2_distilled_folder: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    load(flux2_distilled_folder, "flux2").save(tmp_path / "saved")
    assert DiffusionPipeline.from_pretrained(tmp_path / "saved").config["is_distilled"]
    assert forwards(load(tmp_path / "saved", "flux2"), 0.5) == 1

"""Gradients of the velocity and of the decoder: branches, graph settings, chunks, precision."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from leapalign.flow.graph import inputs_only
from leapalign.flow.rollout import rollout
from leapalign.models.decode import Decoder, straight_through_clamp
from leapalign.models.flux import Flux
from leapalign.models.guidance import Guidance, GuidedVelocity
from leapalign.models.pipeline import PipelineModel
from leapalign.models.sd3 import SD3

PROMPTS = ["a red circle", "two blue star left of the green square"]
SIZE: dict[str, Any] = {"height": 16, "width": 24, "max_sequence_length": 5, "negative_prompt": "blurry"}


def sd3(folder: str, cfg_grad: Literal["both", "cond"] = "both", scale: float = 3.0, dtype: str = "float32"):
    return SD3(path=folder, guidance_scale=scale, cfg_grad=cfg_grad, decode_chunk=1, **SIZE).load("cpu", dtype)


def flux(folder: str, cfg_grad: Literal["both", "cond"] = "both", dtype: str = "float32"):
    return Flux(path=folder, true_cfg_scale=2.5, cfg_grad=cfg_grad, decode_chunk=1, **SIZE).load("cpu", dtype)


def noise(model: PipelineModel) -> Tensor:
    return model.noise([torch.Generator().manual_seed(seed) for seed in (3, 4)])


def policy_gradient(model: PipelineModel, graph: str, steps: int = 2) -> tuple[Tensor, Tensor]:
    """Two nested steps (gradient through x and through the weights) -> final state, gradient of all weights."""
    model.policy.zero_grad()
    blocks, inputs = "blocks" in graph, "inputs" in graph
    (model.policy.enable_gradient_checkpointing if blocks else model.policy.disable_gradient_checkpointing)()  # type: ignore[operator]
    velocity = model.velocity(model.encode(PROMPTS))
    x_0 = rollout(inputs_only(velocity) if inputs else velocity, noise(model), model.sigmas(4), graph_steps=steps)
    x_0.square().mean().backward()
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.policy.parameters()]
    return x_0.detach(), torch.cat([g.flatten() for g in zero]).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg_grad", ["both", "cond"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_graph_settings_agree(family: str, cfg_grad: Any, dtype: str, request: pytest.FixtureRequest) -> None:
    model = {"sd3": sd3, "flux": flux}[family](request.getfixturevalue(f"{family}_folder"), cfg_grad, dtype=dtype)
    x_0, expected = policy_gradient(model, "all")
    assert expected.abs().max() > 1e-3
    for graph in ("blocks", "inputs", "blocks and inputs"):
        x, gradient = policy_gradient(model, graph)
        assert torch.equal(x, x_0), graph
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()), msg=graph)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_the_prompts_branch_alone(dtype: str, sd3_folder: str) -> None:
    """Same value bit for bit; the gradient is scale times that of the unguided model, also under autocast."""
    scale = 3.0
    both, cond = (sd3(sd3_folder, grad, scale, dtype) for grad in ("both", "cond"))
    plain = sd3(sd3_folder, scale=1.0, dtype=dtype)
    x, sigma = noise(both), torch.tensor(0.6)
    weights = torch.randn(x.shape)
    gradients = {}
    for name, model in (("both", both), ("cond", cond), ("plain", plain)):
        v = model.velocity(model.encode(PROMPTS))(x, sigma)
        (v * weights).sum().backward()
        gradients[name] = v.detach(), torch.cat([p.grad.flatten() for p in model.policy.parameters()])
    assert torch.equal(gradients["both"][0], gradients["cond"][0])
    assert not torch.equal(gradients["cond"][0], gradients["plain"][0])
    exact = 1e-5 if dtype == "float32" else 2e-2
    difference = (gradients["cond"][1] - scale * gradients["plain"][1]).norm() / gradients["cond"][1].norm()
    assert difference < exact
    assert (gradients["both"][1] - gradients["cond"][1]).norm() / gradients["cond"][1].norm() > 0.1


def test_guidance_by_hand() -> None:
    """v = n + s (p - n), p = 2 w x, n = w x: dv/dw = (1 + s) x through both branches, 2 s x through the prompt's."""
    from leapalign.models.base import Conditioning, Text

    def text(value: float) -> Text:
        return Text(torch.full((1, 1, 1), value), torch.zeros(1, 1))

    x, s = torch.tensor([[5.0]]), 3.0
    for through_both, expected in ((True, (1 + s) * 5), (False, 2 * s * 5)):
        w = torch.tensor(1.5, requires_grad=True)

        def predict(x: Tensor, sigma: Tensor, text: Text, w: Tensor = w) -> Tensor:
            return w * x * text.tokens[:, 0]

        guidance = Guidance(s, through_both, "")
        v = GuidedVelocity(predict, Conditioning(text(2.0), text(1.0)), guidance)(x, torch.tensor(1.0))
        v.sum().backward()
        assert v.item() == pytest.approx((1 + s) * 1.5 * 5) and w.grad is not None
        assert w.grad.item() == pytest.approx(expected)


def test_scale_of_at_most_one_runs_one_branch(sd3_folder: str) -> None:
    for scale, forwards in ((0.0, 1), (1.0, 1), (1.5, 2)):
        model, calls = sd3(sd3_folder, scale=scale), []
        model.policy.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.velocity(model.encode(PROMPTS))(noise(model), torch.tensor(0.5))
        assert len(calls) == forwards


def test_velocity_refuses_another_number_of_latents(sd3_folder: str) -> None:
    model = sd3(sd3_folder)
    with pytest.raises(ValueError, match="2 latents for 1 prompts"):
        model.velocity(model.encode(PROMPTS[:1]))(noise(model), torch.tensor(0.5))


def test_only_the_policy_is_trained(flux_folder: str) -> None:
    model = flux(flux_folder)
    assert all(p.requires_grad for p in model.policy.parameters())
    assert not any(p.requires_grad for p in model.decoder.vae.parameters())
    model.decode(noise(model).requires_grad_()).sum().backward()
    assert all(p.grad is None for p in model.decoder.vae.parameters())


# ---- decode


def test_clamp_is_straight_through() -> None:
    x = torch.tensor([-3.7, -1e-3, 0.0, 0.3, 1.0, 1.001, 1e6], requires_grad=True)
    y = straight_through_clamp(x)
    assert y.tolist() == x.detach().clamp(0, 1).tolist()  # exactly in range
    y.backward(torch.arange(7.0))
    assert x.grad is not None and x.grad.tolist() == list(range(7))


def images_and_gradient(decoder: Decoder, latents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    z = latents.clone().requires_grad_()
    images = Decoder(decoder.vae, decoder.scale, decoder.shift, chunk)(z)
    images.backward(torch.randn(images.shape, generator=torch.Generator().manual_seed(5)))
    assert z.grad is not None
    return images.detach(), z.grad


def test_decode_does_not_depend_on_the_chunk(sd3_folder: str) -> None:
    decoder = sd3(sd3_folder).decoder
    latents = 2 * torch.randn(5, 4, 8, 12)
    images, gradient = images_and_gradient(decoder, latents, 0)
    assert 0 < (images == 0).float().mean() < 1 and (gradient != 0).all()
    for chunk in (1, 2, 3, 8):
        other, other_gradient = images_and_gradient(decoder, latents, chunk)
        torch.testing.assert_close(other, images, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_decode_by_hand_with_gradient(sd3_folder: str) -> None:
    """Against the VAE called without checkpoint and chunk, with the normalisation written out."""
    decoder = sd3(sd3_folder).decoder
    z = torch.randn(2, 4, 8, 12, requires_grad=True)
    plain = 0.5 + 0.5 * decoder.vae.decode(z / 0.7 + 0.25).sample
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5))
    (expected,) = torch.autograd.grad(plain, z, g)
    images, gradient = images_and_gradient(decoder, z.detach(), 1)
    torch.testing.assert_close(images, plain.detach().clamp(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


class Squares(nn.Module):
    """Stands in for a VAE; notes how many latents each call got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.calls.append(len(z))
        return (z.square().square(),)


def test_decode_keeps_the_graph_of_one_chunk_only() -> None:
    """Saved by the forward: each chunk's latents, nothing from inside the VAE, which is rebuilt chunk by chunk."""
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel():  # torch 2.9's checkpoint also saves an empty tensor
            saved.append(tuple(tensor.shape))
        return tensor

    z = torch.randn(4, 1, 2, 2, requires_grad=True)
    vae = Squares()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = Decoder(vae, 1.0, 0.0, 2)(z)
        assert saved == [(2, 1, 2, 2)] * 2
        saved.clear()
        vae.decode(z, False)
        assert saved == [(4, 1, 2, 2)] * 2  # two squares: this is what the checkpoint does not keep
    images.sum().backward()
    assert vae.calls == [2, 2, 4, 2, 2]  # one recomputation a chunk


@pytest.mark.parametrize(("chunk", "forwards"), [(0, 1), (4, 1), (9, 1), (2, 4), (3, 4), (1, 8)])
def test_a_batch_that_is_one_chunk_is_decoded_once(chunk: int, forwards: int) -> None:
    """Several chunks, and single images, are decoded again in the backward pass; without gradient nothing is."""
    z, vae = torch.randn(4, 1, 2, 2, requires_grad=True), Squares()
    Decoder(vae, 1.0, 0.0, chunk)(z).sum().backward()
    assert len(vae.calls) == forwards
    vae.calls.clear()
    with torch.no_grad():
        Decoder(vae, 1.0, 0.0, chunk)(z)
    assert sum(vae.calls) == 4


def test_decode_leaves_autocast(sd3_folder: str) -> None:
    decoder = copy.copy(sd3(sd3_folder).decoder)
    z = torch.randn(1, 4, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decoder(z)
    assert torch.equal(inside, decoder(z))


def test_bfloat16_keeps_no_copies_of_the_weights_between_their_uses(sd3_folder: str) -> None:
    """As autocast's cache would, to the end of a forward."""
    model, kept = sd3(sd3_folder, scale=1.0, dtype="bfloat16"), []
    linear = next(m for m in model.policy.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    with torch.no_grad():
        model.velocity(model.encode(PROMPTS))(noise(model), torch.tensor(0.5))
    assert kept == [False]

"""A quantised base: int8 really runs where torchao is installed; nf4 needs a GPU, so here its configuration."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from leapalign.errors import UserError
from leapalign.tuning import quantization
from leapalign.tuning.adapter import lora_layers, merged
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES, PROMPTS, disturb, generators


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_none_is_no_configuration():
    assert quantization.quantization_config("none") is None


@pytest.mark.parametrize(("kind", "package"), quantization.PACKAGES.items())
def test_a_missing_package_is_named(kind, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{kind} needs the package {package}: pip install {package}"):
        quantization.quantization_config(kind)


def test_nf4_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="nf4 needs a GPU"):
        quantization.quantization_config("nf4")


@pytest.mark.skipif(not has("bitsandbytes"), reason="bitsandbytes is not installed")
def test_nf4_asks_diffusers_for_four_bits_and_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = quantization.quantization_config("nf4")
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(not has("torchao"), reason="torchao is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_near_bfloat16_in_values_and_gradients(folders, family):
    results = []
    for kind in ("none", "int8"):
        model = FAMILIES[family].config(folders[family]).load("cpu", "bfloat16", LoRA(rank=2, quantization=kind))
        disturb(model.policy)
        x = model.noise(generators()).requires_grad_()
        v = model.velocity(model.encode(PROMPTS))(x, torch.tensor(0.6))
        v.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
        results.append((v.detach(), x.grad, grads))
    layer = next(iter(lora_layers(model.policy).values()))
    assert type(layer.base_layer.weight).__name__ == "Int8Tensor"
    for plain, quantised in zip(*results):
        error = float((plain - quantised).norm() / plain.norm())
        assert 1e-4 < error < 0.15, error
    with pytest.raises(UserError, match="quantised base"):
        merged(model.policy)

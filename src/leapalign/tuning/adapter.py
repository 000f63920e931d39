"""The adapter inside a policy: W x + scale B A x (LoRA, arXiv 2106.09685), through diffusers' and peft's own layers.

A and B are float32 whatever the base is held in: with bfloat16 masters and the usual learning rates an update is less
than half a unit in the last place of A, and A never moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.seeds import generator

ADAPTER = "default"  # peft's name of the one adapter that a policy has


class StepDropout(nn.Module):
    """x [..., in] times a mask over its features, the same for all rows, tokens, steps and recomputations of an update.

    So inside an update the velocity is one function, as a rollout and its gradient need; elsewhere it is the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None  # [in], 0 or 1 / (1 - p); no buffer, because it is not the model's

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask.to(x.dtype)


def attach(policy: Any, names: Sequence[str], *, rank: int, alpha: float) -> None:
    """Put an adapter of float32 weights on the linear layers of these full names; everything else stays frozen."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # peft draws an A on the CPU, which `initialise` replaces
        policy.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names)))  # pyright: ignore
    for layer in lora_layers(policy).values():
        layer.lora_A.float()
        layer.lora_B.float()
        layer.lora_dropout[ADAPTER] = StepDropout()
    policy.eval()


def lora_layers(policy: nn.Module) -> dict[str, Any]:
    """Full name of the linear layer -> peft's layer around it, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def initialise(policy: nn.Module, init: str, seed: int) -> None:
    """B = 0, so that the policy is the base; A from (seed, layer's name): "kaiming", peft's default, or "gaussian"."""
    for name, layer in lora_layers(policy).items():
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # [r, in], [out, r]
        rng = generator(seed, step=0, sample=0, purpose=f"lora {name}")
        if init == "kaiming":  # U(-1/sqrt(in), 1/sqrt(in)): Kaiming's bound at the slope sqrt(5)
            bound = 1 / math.sqrt(A.shape[1])
            A.copy_((2 * torch.rand(A.shape, generator=rng) - 1) * bound)
        else:
            A.copy_(torch.randn(A.shape, generator=rng) / A.shape[0])
        B.zero_()


@contextmanager
def dropout(policy: nn.Module, p: float, seed: int, step: int) -> Iterator[None]:
    """Inside, each input feature of each adapter is dropped with probability `p`, decided by (seed, step, layer)."""
    layers = lora_layers(policy)
    for name, layer in layers.items():
        A = layer.lora_A[ADAPTER].weight
        rng = generator(seed, step=step, sample=0, purpose=f"lora dropout {name}")
        kept = torch.rand(A.shape[1], generator=rng) >= p
        layer.lora_dropout[ADAPTER].mask = (kept / (1 - p)).to(A.device)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.lora_dropout[ADAPTER].mask = None


@contextmanager
def switched_off(policy: Any) -> Iterator[None]:
    """Inside, the policy is its frozen base, and no graph is kept: a reference is a constant.

    (A recomputing graph built inside would be recomputed outside, with the adapter.)
    """
    if not lora_layers(policy):
        raise UserError(
            "reference: these weights were tuned in place and hold no copy of the base; load the model a second time, "
            "or train with an adapter (leapalign.tuning.lora.LoRA)"
        )
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    policy.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.enable_adapters()
        for name, p in policy.named_parameters():  # peft's switch marks every adapter weight as trained
            p.requires_grad_(name in trained)


def adapter_state(policy: nn.Module) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r], with the scale alpha / r taken into B.

    So alpha = r in what is saved, and readers that know no alpha apply the same strength.
    """
    state = {}
    for name, layer in lora_layers(policy).items():
        scale = layer.scaling[ADAPTER]
        state[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().cpu().contiguous()
        state[f"{name}.lora_B.weight"] = (layer.lora_B[ADAPTER].weight.detach() * scale).cpu().contiguous()
    return state


@torch.no_grad()
def restore(policy: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put a saved state into an adapter whose alpha is its rank. UserError where names or shapes differ."""
    own = {}
    for name, layer in lora_layers(policy).items():
        own[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        own[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
    if odd := sorted(own.keys() ^ state.keys()):
        raise UserError(f"{where}: its layers are not those of the run's adapter, for instance {odd[0]}")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise UserError(f"{where}: {name} is {tuple(state[name].shape)}, the run's adapter has {tuple(p.shape)}")
        p.copy_(state[name])


def merged(policy: Any) -> Any:
    """The policy as a plain transformer with W + scale B A, summed in float32 and rounded once to the base's dtype.

    A policy without an adapter is returned as it is. In bfloat16 the rounding is up to 2^-8 of each weight, which may
    be more than a short training changed. Merged weights are copies; UserError where the base is quantised.
    """
    from accelerate import init_empty_weights

    layers = lora_layers(policy)
    if not layers:
        return policy
    if getattr(policy, "hf_quantizer", None) is not None:
        raise UserError(
            "the adapter cannot be merged into a quantised base. If the run quantised it, `leapalign export RUN "
            "--format pipeline` merges it into the weights of the base's folder; if that folder is quantised itself, "
            "export --format lora and load it beside the base"
        )
    state = _plain_state(policy, layers)
    with init_empty_weights():
        plain = type(policy).from_config(policy.config)
    plain.load_state_dict(state, assign=True)
    return plain.eval()


@torch.no_grad()
def _plain_state(policy: nn.Module, layers: dict[str, Any]) -> dict[str, Tensor]:
    state = {}
    for full_name, value in policy.state_dict().items():
        if ".lora_" in full_name:
            continue
        name = full_name.replace(".base_layer.", ".")
        layer = layers.get(name.removesuffix(".weight")) if ".base_layer." in full_name else None
        if layer is not None and name.endswith(".weight"):
            value = (value.float() + layer.get_delta_weight(ADAPTER)).to(value.dtype)
        state[name] = value
    return state

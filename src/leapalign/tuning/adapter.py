"""The adapter inside a policy: W x + scale B A x (LoRA, arXiv 2106.09685), through diffusers' and peft's own layers.

A and B are float32 whatever the base's dtype: in bfloat16, at the usual learning rates, an update is less than half a
unit in the last place of A, and A never changes.
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
from leapalign.tuning.quantization import Quantised

ADAPTER = "default"  # peft's name of the one adapter that a policy has


class StepDropout(nn.Module):
    """Multiply x [..., in] by one mask of its features for all rows, tokens, steps and recomputations of an update.

    Within an update the velocity is then one function, as a rollout and its gradient need. Identity without a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None  # [in], 0 or 1 / (1 - p); not a buffer, which state dicts would hold

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask.to(x.dtype)


def attach(policy: Any, names: Sequence[str], *, rank: int, alpha: float) -> None:
    """Add a float32 adapter of this rank to the linear layers with these full names; all other weights stay frozen."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU; `initialise` replaces it
        policy.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names)))  # pyright: ignore
    for layer in lora_layers(policy).values():
        layer.lora_A.float()
        layer.lora_B.float()
        layer.lora_dropout[ADAPTER] = StepDropout()
    policy.eval()


def lora_layers(policy: nn.Module) -> dict[str, Any]:
    """Full name of a linear layer -> peft's layer around it, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def initialise(policy: nn.Module, init: str, seed: int) -> None:
    """Set B = 0, so that the policy equals the base, and draw A from (seed, layer's name).

    `init`: "kaiming", peft's default, or "gaussian", N(0, 1) / rank.
    """
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
    """Drop input features of each adapter with probability `p` in [0, 1) while open, drawn from (seed, step, layer)."""
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
    """Turn the adapter and autograd off while open, for a constant reference. Raises UserError without an adapter.

    A graph with recomputation that is built here would be recomputed later, with the adapter; hence no graph.
    The reference is the base without any adapter, also where training began with one (`LoRA.start`).
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
    """Return `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r], on the CPU, B scaled by alpha / r.

    The saved adapter has alpha = r, so that readers without an alpha apply it at the same strength.
    """
    state = {}
    for name, layer in lora_layers(policy).items():
        scale = layer.scaling[ADAPTER]
        state[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().cpu().contiguous()
        state[f"{name}.lora_B.weight"] = (layer.lora_B[ADAPTER].weight.detach() * scale).cpu().contiguous()
    return state


@torch.no_grad()
def restore(policy: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a saved state into an adapter with alpha = rank. Raises UserError if names or shapes differ."""
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
    """Return a plain transformer with weights W + scale B A, summed in float32 and rounded once to the base's dtype.

    Returns a policy without an adapter unchanged. In bfloat16, rounding changes a weight by up to 2^-8 of it, which may
    be more than a short training does. Merged weights are copies. Raises UserError if the base is quantised.
    """
    from accelerate import init_empty_weights

    layers = lora_layers(policy)
    if not layers:
        return policy
    if isinstance(policy, Quantised):
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

"""Transformers of diffusers in the key names of their authors' repositories: the inverse of diffusers' converters.

Written from the modules: fused projections are their parts one below the other, and the last modulation stores shift
before scale where diffusers stores scale before shift.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_model
from torch import Tensor

State = dict[str, Tensor]


def _take(state: State, out: State, old: str, *new: str, swap: bool = False) -> None:
    """Weight and bias of `new` (fused, if several) under the name `old`."""
    for kind in ("weight", "bias"):
        if all(f"{name}.{kind}" in state for name in new):
            fused = torch.cat([state.pop(f"{name}.{kind}") for name in new])
            out[f"{old}.{kind}"] = torch.cat(fused.chunk(2)[::-1]) if swap else fused


def flux(state: State) -> State:
    state, out = dict(state), {}
    for embedder, old in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        _take(state, out, f"{old}.in_layer", f"time_text_embed.{embedder}_embedder.linear_1")
        _take(state, out, f"{old}.out_layer", f"time_text_embed.{embedder}_embedder.linear_2")
    _take(state, out, "txt_in", "context_embedder")
    _take(state, out, "img_in", "x_embedder")
    for i in range(_layers(state, "transformer_blocks")):
        new, old = f"transformer_blocks.{i}", f"double_blocks.{i}"
        _take(state, out, f"{old}.img_mod.lin", f"{new}.norm1.linear")
        _take(state, out, f"{old}.txt_mod.lin", f"{new}.norm1_context.linear")
        _take(state, out, f"{old}.img_attn.qkv", *(f"{new}.attn.to_{x}" for x in "qkv"))
        _take(state, out, f"{old}.txt_attn.qkv", *(f"{new}.attn.add_{x}_proj" for x in "qkv"))
        _take(state, out, f"{old}.img_attn.proj", f"{new}.attn.to_out.0")
        _take(state, out, f"{old}.txt_attn.proj", f"{new}.attn.to_add_out")
        for stream, added, ff in (("img", "", "ff"), ("txt", "added_", "ff_context")):
            for x, word in (("q", "query"), ("k", "key")):
                out[f"{old}.{stream}_attn.norm.{word}_norm.scale"] = state.pop(f"{new}.attn.norm_{added}{x}.weight")
            _take(state, out, f"{old}.{stream}_mlp.0", f"{new}.{ff}.net.0.proj")
            _take(state, out, f"{old}.{stream}_mlp.2", f"{new}.{ff}.net.2")
    for i in range(_layers(state, "single_transformer_blocks")):
        new, old = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        _take(state, out, f"{old}.modulation.lin", f"{new}.norm.linear")
        _take(state, out, f"{old}.linear1", *(f"{new}.attn.to_{x}" for x in "qkv"), f"{new}.proj_mlp")
        _take(state, out, f"{old}.linear2", f"{new}.proj_out")
        for x, word in (("q", "query"), ("k", "key")):
            out[f"{old}.norm.{word}_norm.scale"] = state.pop(f"{new}.attn.norm_{x}.weight")
    _take(state, out, "final_layer.linear", "proj_out")
    _take(state, out, "final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    return _all(state, out)


def sd3(state: State) -> State:
    state, out = dict(state), {}
    out["pos_embed"] = state.pop("pos_embed.pos_embed")
    _take(state, out, "x_embedder.proj", "pos_embed.proj")
    for embedder, old in (("timestep", "t_embedder"), ("text", "y_embedder")):
        _take(state, out, f"{old}.mlp.0", f"time_text_embed.{embedder}_embedder.linear_1")
        _take(state, out, f"{old}.mlp.2", f"time_text_embed.{embedder}_embedder.linear_2")
    _take(state, out, "context_embedder", "context_embedder")
    layers = _layers(state, "transformer_blocks")
    for i in range(layers):
        new, image, text = f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        _take(state, out, f"{image}.attn.qkv", *(f"{new}.attn.to_{x}" for x in "qkv"))
        _take(state, out, f"{text}.attn.qkv", *(f"{new}.attn.add_{x}_proj" for x in "qkv"))
        _take(state, out, f"{image}.attn2.qkv", *(f"{new}.attn2.to_{x}" for x in "qkv"))
        for x in "qk":
            _take(state, out, f"{image}.attn.ln_{x}", f"{new}.attn.norm_{x}")
            _take(state, out, f"{text}.attn.ln_{x}", f"{new}.attn.norm_added_{x}")
            _take(state, out, f"{image}.attn2.ln_{x}", f"{new}.attn2.norm_{x}")
        _take(state, out, f"{image}.attn.proj", f"{new}.attn.to_out.0")
        _take(state, out, f"{text}.attn.proj", f"{new}.attn.to_add_out")
        _take(state, out, f"{image}.attn2.proj", f"{new}.attn2.to_out.0")
        _take(state, out, f"{image}.adaLN_modulation.1", f"{new}.norm1.linear")
        _take(state, out, f"{text}.adaLN_modulation.1", f"{new}.norm1_context.linear", swap=i == layers - 1)
        for block, ff in ((image, "ff"), (text, "ff_context")):
            _take(state, out, f"{block}.mlp.fc1", f"{new}.{ff}.net.0.proj")
            _take(state, out, f"{block}.mlp.fc2", f"{new}.{ff}.net.2")
    _take(state, out, "final_layer.linear", "proj_out")
    _take(state, out, "final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    return _all(state, out)


def _layers(state: State, name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def _all(rest: State, out: State) -> State:
    assert not rest, f"not translated: {sorted(rest)}"
    return {key: weight.contiguous() for key, weight in out.items()}


def narrow_flux_converter(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """diffusers' converter has FLUX's width (3072) as a constant: the same code with that of a tiny model."""
    table: dict[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert: Callable[..., Any] = table["checkpoint_mapping_fn"]
    assert 3072 in convert.__code__.co_consts
    constants = tuple(width if value == 3072 else value for value in convert.__code__.co_consts)
    narrowed = types.FunctionType(
        convert.__code__.replace(co_consts=constants), convert.__globals__, convert.__name__, None, convert.__closure__
    )
    monkeypatch.setitem(table, "checkpoint_mapping_fn", narrowed)

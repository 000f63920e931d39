"""Names for ComfyUI, read back by diffusers: its LoRA converters, and for SD3 that of single-file checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.tuning.comfyui import LAYOUTS, to_comfyui
from leapalign.tuning.targets import DEFAULTS
from lora_transformers import RANK, random_state, transformers

TRANSFORMERS = transformers()
PIPELINES = {  # whose lora_state_dict reads this layout
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
}
SAME_TENSORS = set(PIPELINES) - {"ZImageTransformer2DModel"}  # its converter gives q, k and v the whole `down`


def read_back(family: str, converted: dict[str, Tensor]) -> dict[str, Tensor]:
    import diffusers

    state = getattr(diffusers, PIPELINES[family]).lora_state_dict(dict(converted))
    return {name.removeprefix("transformer."): value for name, value in state.items()}


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """layer -> B A X of three random columns X: the whole product of a wide layer would take 150 MB."""
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {n: state[f"{n}.lora_B.weight"] @ columns(state[f"{n}.lora_A.weight"]) for n in names}


def columns(left: Tensor) -> Tensor:
    """left X, X [in, 3] of the width alone."""
    width = left.shape[1]
    return left @ torch.randn(width, 3, generator=torch.Generator().manual_seed(width)) / width**0.5


def test_every_family_with_a_default_has_names():
    assert set(LAYOUTS) == set(DEFAULTS) == set(PIPELINES) | {"SD3Transformer2DModel"}


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_reads_the_adapter_back(family):
    plain = TRANSFORMERS[family]
    state = random_state(plain)
    back = read_back(family, to_comfyui(state, plain))
    if family in SAME_TENSORS:
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    expected, found = products(state), products(back)
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        torch.testing.assert_close(found[name], product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "targets", "with_zeros"),
    [
        ("FluxTransformer2DModel", ("attn.to_q", "proj_mlp"), ("attn.to_k", "attn.to_v")),
        ("ZImageTransformer2DModel", ("to_q",), ("to_k", "to_v")),
    ],
)
def test_parts_without_an_adapter_are_zeros(family, targets, with_zeros):
    plain = TRANSFORMERS[family]
    state = random_state(plain, targets)
    expected, found = products(state), products(read_back(family, to_comfyui(state, plain)))
    for name, product in found.items():
        torch.testing.assert_close(product, expected.get(name, torch.zeros_like(product)), rtol=1e-5, atol=1e-5)
    assert expected.keys() <= found.keys()
    assert {name for name in found if name.endswith(with_zeros)} >= found.keys() - expected.keys()


class Deltas(dict):
    """An original SD3 checkpoint of changes: the converter asks by original names, and gets `up @ down` or zeros."""

    def __init__(self, converted: dict[str, Tensor]) -> None:
        # the converter counts blocks, and looks for the second attention, among the keys
        super().__init__({"joint_blocks.1.x_block": None, "joint_blocks.0.x_block.attn2.qkv": None})
        flat = {name.rsplit(".", 2)[0] for name in converted if name.endswith(".lora_down.weight")}
        self.left = {n: converted[f"{n}.lora_up.weight"] @ converted[f"{n}.lora_down.weight"] for n in flat}

    def pop(self, key: str, *default: Tensor) -> Tensor:
        flat = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        return self.left.pop(flat) if key.endswith(".weight") and flat in self.left else torch.zeros(6)

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6)


def test_sd3_changes_the_weights_that_the_checkpoint_converter_means():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    plain = TRANSFORMERS["SD3Transformer2DModel"]
    state = random_state(plain)
    deltas = Deltas(to_comfyui(state, plain))
    changed = convert_sd3_transformer_checkpoint_to_diffusers(deltas)
    assert not deltas.left  # every name of ours is one of the original's
    for name, product in products(state).items():
        torch.testing.assert_close(columns(changed[f"{name}.weight"]), product, rtol=1e-5, atol=1e-5)


def test_alpha_is_the_rank_of_what_is_joined():
    plain = TRANSFORMERS["FluxTransformer2DModel"]
    converted = to_comfyui(random_state(plain), plain)
    assert float(converted["lora_unet_double_blocks_1_img_attn_qkv.alpha"]) == 3 * RANK
    assert float(converted["lora_unet_single_blocks_0_linear1.alpha"]) == 4 * RANK
    assert float(converted["lora_unet_single_blocks_0_linear2.alpha"]) == RANK
    assert {name.rsplit(".", 1)[-1] for name in converted} == {"weight", "alpha"}


def test_what_has_no_name_is_refused():
    plain = TRANSFORMERS["FluxTransformer2DModel"]
    with pytest.raises(UserError, match=r"no name for the layer x_embedder.*use format lora"):
        to_comfyui(random_state(plain, ("x_embedder",)), plain)
    with pytest.raises(UserError, match="no names for Linear"):
        to_comfyui({}, nn.Linear(1, 1))

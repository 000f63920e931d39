"""Which layers get an adapter: the families' defaults over diffusers' own classes, and a user's names."""

from __future__ import annotations

import pytest
from torch import nn

from leapalign.errors import UserError
from leapalign.tuning.targets import endings, find_targets, linear_layers
from lora_transformers import TARGETS, transformers

TRANSFORMERS = transformers()
OUTSIDE = {  # linear layers that no default has, by their ends: embeddings, modulation, the last projection
    "SD3Transformer2DModel": {
        *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
        *("time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"),
        *("context_embedder", "norm_out.linear", "proj_out", "norm1.linear", "norm1_context.linear"),
    },
    "FluxTransformer2DModel": {
        *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
        *("time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"),
        *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
        *("norm1.linear", "norm1_context.linear", "norm.linear"),
    },
    "Flux2Transformer2DModel": {
        *("time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.timestep_embedder.linear_2"),
        *("time_guidance_embed.guidance_embedder.linear_1", "time_guidance_embed.guidance_embedder.linear_2"),
        *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
        *("single_stream_modulation.linear", "x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    },
    "QwenImageTransformer2DModel": {
        *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
        *("img_in", "txt_in", "img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out"),
    },
    "ZImageTransformer2DModel": {
        *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "adaLN_modulation.0"),
    },
}


@pytest.mark.parametrize("family", TARGETS)
def test_the_default_is_every_linear_layer_of_the_blocks_but_modulation(family):
    plain = TRANSFORMERS[family]
    layers, chosen = linear_layers(plain), find_targets(plain, (), TARGETS[family])
    rest = [layer for layer in layers if layer not in chosen]
    whole = {layer for layer in rest if layer in OUTSIDE[family]}
    assert {e for layer in rest if layer not in whole for e in endings([layer])} | whole == OUTSIDE[family]
    assert len(chosen) > 12 and {layer.split(".")[1] for layer in chosen} == {"0", "1"}  # both blocks


def test_the_defaults_are_those_of_the_classes_here():
    assert set(TARGETS) == set(TRANSFORMERS) == set(OUTSIDE)


def test_sd3_without_a_second_attention_has_a_default_too():
    import diffusers

    plain = diffusers.SD3Transformer2DModel(
        sample_size=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=4,
    )  # fmt: skip
    layers = find_targets(plain, (), TARGETS["SD3Transformer2DModel"])
    assert layers and not any("attn2" in layer for layer in layers)


def test_the_last_projection_of_flux_is_not_that_of_a_block():
    plain = TRANSFORMERS["FluxTransformer2DModel"]
    chosen = find_targets(plain, (), TARGETS["FluxTransformer2DModel"])
    assert "single_transformer_blocks.1.proj_out" in chosen and "proj_out" not in chosen


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("to_q",), ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]),
        (("transformer_blocks.1.attn.to_q",), ["transformer_blocks.1.attn.to_q"]),
        (("transformer_blocks.1.attn.add_*_proj",), [f"transformer_blocks.1.attn.add_{x}_proj" for x in "kqv"]),
        (("img_in", "txt_in"), ["img_in", "txt_in"]),
    ],
)
def test_names_are_ends_of_paths(targets, expected):
    assert sorted(find_targets(TRANSFORMERS["QwenImageTransformer2DModel"], targets)) == expected


def test_a_name_that_means_nothing_is_refused_with_a_near_one():
    plain = TRANSFORMERS["FluxTransformer2DModel"]
    with pytest.raises(UserError, match=r"named 'attn.to_qq'; did you mean 'attn.to_q'\?"):
        find_targets(plain, ("ff.net.2", "attn.to_qq"))
    with pytest.raises(UserError, match="no linear layer"):  # a module, but no linear one
        find_targets(plain, ("attn",))


def test_a_family_without_a_default_needs_names():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="the family of Sequential has no default"):
        find_targets(plain, ())
    assert find_targets(plain, ("0",)) == ["0"]


def test_full_fine_tuning_of_a_quantised_base_is_refused():
    from leapalign.tuning.full import FULL

    plain = nn.Linear(2, 2)
    FULL.initialise(plain, 0)
    plain.hf_quantizer = object()  # as diffusers marks a model whose folder says how it is quantised
    with pytest.raises(UserError, match="quantised already: full fine-tuning needs the unquantised model"):
        FULL.initialise(plain, 0)

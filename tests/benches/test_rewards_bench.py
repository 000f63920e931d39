"""The bench of full-size rewards: its architectures are the published ones, and what it counts is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from golden_folder import golden
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file
from leapalign.rewards.clip.sizes import cosine
from leapalign.rewards.hpsv2.model import from_open_clip
from leapalign.rewards.imagereward.model import from_original

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_file(str(BENCHES / "rewards.py"))


@pytest.mark.parametrize(("name", "convert"), [("hpsv2", from_open_clip), ("imagereward", from_original)])
def test_sizes_are_the_published_checkpoints(bench, name, convert):
    stored = json.loads((golden(name) / "full_size_keys.json").read_text())["keys"]
    weights = convert({key: torch.empty(shape, device="meta") for key, shape in stored.items()})
    model = bench.empty(bench.ARCHITECTURES[name]).model
    assert {key: weight.shape for key, weight in model.state_dict().items()} == {
        key: weight.shape for key, weight in weights.items()
    }
    parameters = sum(weight.numel() for weight in weights.values())
    assert bench.sizes(bench.ARCHITECTURES[name]) == {
        "parameters": parameters,
        "bytes_float32": 4 * parameters,
        "bytes_bfloat16": 2 * parameters,
    }


def test_hpsv3_has_the_published_shapes(bench):
    stored = json.loads((golden("hpsv3") / "full_size_keys.json").read_text())["keys"]
    model = bench.empty(bench.ARCHITECTURES["hpsv3"]).model
    names = {
        key.replace("backbone.", "").replace("language_model.", "model."): w for key, w in model.state_dict().items()
    }
    assert {key: list(weight.shape) for key, weight in names.items()} == {
        key: shape for key, shape in stored.items() if key != "lm_head.weight"
    }
    assert bench.sizes(bench.ARCHITECTURES["hpsv3"])["parameters"] == 7_748_610_610


def test_nothing_is_allocated_for_sizes(bench):
    for architecture in bench.ARCHITECTURES.values():
        assert {weight.device.type for weight in bench.empty(architecture).model.parameters()} == {"meta"}


def test_cost_of_a_tiny_reward(bench, monkeypatch):
    from transformers import CLIPConfig

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 24, "patch_size": 8},
        text_config={**tower, "eos_token_id": 2},
        projection_dim=8,
    )
    tiny = cosine("tiny", lambda: config)
    monkeypatch.setitem(bench.ARCHITECTURES, "tiny", tiny)
    found = bench.main(bench.Rewards(run="tiny", pixels=40, repeats=2))["rewards"]
    cost = found["tiny"]["one_image"]
    assert found["tiny"]["bytes_float32"] <= cost["weights"] <= cost["resident"]
    assert all(cost[what][phase] > 0 for what in ("seconds", "cpu_seconds", "peak") for phase in ("score", "gradient"))
    assert cost["peak"]["gradient"] >= 4 * 3 * 40 * 40, "the gradient at the image is among them"
    assert "one_image" not in found["hpsv2"]


def test_what_cannot_be_run_is_named(bench):
    with pytest.raises(UserError, match="unknown; one of pickscore, clipscore, hpsv2"):
        bench.main(bench.Rewards(run="hpsv9"))
    with pytest.raises(UserError, match="need 3944437764 bytes in float32, more than --most-bytes 1000"):
        bench.main(bench.Rewards(run="hpsv2", most_bytes=1000))

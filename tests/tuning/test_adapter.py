"""The adapter's values: beginning, reference, precision, dropout, merging."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.flow.graph import inputs_only
from leapalign.models.flux import Flux
from leapalign.storage.pipeline_folder import open_folder
from leapalign.tuning import adapter
from leapalign.tuning.adapter import adapter_state, lora_layers, merged, restore
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES, PROMPTS, disturb, generators

SIGMA = torch.tensor(0.6)


def load(folders: dict[str, str], family: str, tuning: LoRA | None = None, dtype: str = "float32") -> Any:
    config = FAMILIES[family].config(folders[family])
    return config.load("cpu", dtype, tuning) if tuning else config.load("cpu", dtype)


def velocity(model: Any) -> Tensor:
    return model.velocity(model.encode(PROMPTS))(model.noise(generators()), SIGMA)


def matrices(model: Any, which: str) -> dict[str, Tensor]:
    return {name: p for name, p in model.policy.named_parameters() if f".lora_{which}." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_the_beginning_and_stays_the_reference(folders, family):
    base = velocity(load(folders, family)).detach()
    model = load(folders, family, LoRA(rank=2, alpha=6.0))
    assert torch.equal(velocity(model), base)
    disturb(model.policy)
    tuned = velocity(model)
    assert (tuned - base).abs().max() > 1e-2 and tuned.requires_grad
    with model.reference():
        reference = velocity(model)
    assert torch.equal(reference, base) and not reference.requires_grad
    assert torch.equal(velocity(model), tuned)
    trained = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    assert trained == {*matrices(model, "A"), *matrices(model, "B")} and not model.policy.training
    model.policy.requires_grad_(False)
    with model.reference():
        pass
    assert not any(p.requires_grad for p in model.policy.parameters())  # as it was


def test_a_model_without_an_adapter_has_no_reference(folders):
    with pytest.raises(UserError, match="hold no copy of the base"), load(folders, "sd3").reference():
        pass


def test_scale_is_alpha_over_rank(folders):
    """v moves with the scale as with a larger B: linear layers know only scale B A."""
    one, three = (load(folders, "flux", LoRA(rank=2, alpha=alpha)) for alpha in (0.0, 6.0))
    assert {layer.scaling["default"] for layer in lora_layers(one.policy).values()} == {1.0}
    disturb(one.policy), disturb(three.policy)
    assert not torch.allclose(velocity(one), velocity(three), atol=1e-3)
    with torch.no_grad():
        for B in matrices(one, "B").values():
            B.mul_(3)
    torch.testing.assert_close(velocity(one), velocity(three), rtol=1e-4, atol=1e-4)


def test_a_begins_by_the_seed_and_the_layer_alone(folders):
    tuning, state = LoRA(rank=8), torch.random.get_rng_state()
    model = load(folders, "flux", tuning)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn from the global generator

    def drawn(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)
        disturb(model.policy)
        tuning.initialise(model.policy, seed)
        assert not any(B.any() for B in matrices(model, "B").values())
        return {name: A.detach().clone() for name, A in matrices(model, "A").items()}

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    q, k = (first[f"transformer_blocks.0.attn.to_{x}.lora_A.default.weight"] for x in "qk")
    assert not torch.equal(q, k)


def test_the_two_inits_have_their_spread(folders):
    """Kaiming at slope sqrt(5): uniform of variance 1 / (3 in). Gaussian: standard deviation 1 / rank."""
    wide = {}
    for init in ("kaiming", "gaussian"):
        model = load(folders, "flux", LoRA(rank=16, init=init))
        name = "single_transformer_blocks.0.proj_out.lora_A.default.weight"  # [16, 160]
        wide[init] = matrices(model, "A")[name].detach()
    width = wide["kaiming"].shape[1]
    assert wide["kaiming"].abs().max() <= 1 / math.sqrt(width)
    assert float(wide["kaiming"].std()) == pytest.approx(1 / math.sqrt(3 * width), rel=0.1)
    assert float(wide["gaussian"].std()) == pytest.approx(1 / 16, rel=0.1)


def test_masters_are_float32_over_a_bfloat16_base(folders):
    model = load(folders, "sd3", LoRA(rank=2), "bfloat16")
    for name, p in model.policy.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name


def test_a_bfloat16_base_computes_what_float32_computes_to_rounding(folders):
    """Values and gradients; not FLUX, whose guidance input bfloat16 rounds (3.5 becomes 3.504), as in diffusers."""
    results = []
    for dtype in ("float32", "bfloat16"):
        model = load(folders, "sd3", LoRA(rank=2), dtype)
        disturb(model.policy)
        v = velocity(model)
        (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
        results.append((v.detach(), grads))
    for exact, coarse in zip(*results):
        error = float((exact - coarse).norm() / exact.norm())
        assert coarse.dtype == torch.float32 and 1e-4 < error < 0.15, error


def saved_by_a_forward(model: Any) -> list[Tensor]:
    """Every tensor that the graph of one velocity keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        velocity(model)
    return kept


def test_a_bfloat16_base_is_in_memory_once(folders):
    """What the graph of a forward keeps holds no second copy of a frozen weight, as casting a float32 base would."""
    copies = {}
    for base in ("bfloat16", "float32"):
        model = load(folders, "sd3", LoRA(rank=2, base_dtype=base), "bfloat16")
        frozen = [p for p in model.policy.parameters() if not p.requires_grad and p.ndim == 2]
        shapes, own = {p.shape for p in frozen} | {p.t().shape for p in frozen}, {p.data_ptr() for p in frozen}
        kept = saved_by_a_forward(model)
        assert sum(t.data_ptr() in own for t in kept) > 10 or base == "float32"  # the weights themselves
        copies[base] = sum(t.shape in shapes and t.ndim == 2 and _is_weight(t, frozen) for t in kept)
    assert copies["bfloat16"] == 0 and copies["float32"] > 10


def _is_weight(tensor: Tensor, frozen: list[Tensor]) -> bool:
    """Whether it has a frozen weight's values in memory of its own."""
    for p in frozen:
        for view in (p.detach(), p.detach().t()):
            elsewhere = tensor.shape == view.shape and tensor.data_ptr() != p.data_ptr()
            if elsewhere and torch.equal(tensor.float(), view.to(tensor.dtype).float()):
                return True
    return False


def test_float32_masters_move_where_bfloat16_ones_stand_still(folders):
    """AdamW at 5e-6, the same gradients: an update is under half a unit in the last place of most of A in bfloat16."""
    model = load(folders, "sd3", LoRA(rank=4), "bfloat16")
    A = [p for p in matrices(model, "A").values()]
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        masters = [p.detach().to(dtype).clone().requires_grad_() for p in A]
        optimizer = torch.optim.AdamW(masters, lr=5e-6, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in masters:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        changed = torch.cat([(p != a.to(dtype)).flatten() for p, a in zip(masters, A)])
        moved[dtype] = float(changed.float().mean())
    assert moved[torch.float32] > 0.99 and moved[torch.bfloat16] < 0.1


def gradients(model: Any, *, inputs: bool = False) -> dict[str, Tensor]:
    model.policy.zero_grad()
    v = model.velocity(model.encode(PROMPTS))
    x = model.noise(generators()).requires_grad_()
    out = (inputs_only(v) if inputs else v)(x, SIGMA)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}


def test_dropout_is_one_mask_an_update(folders):
    tuning = LoRA(rank=2, dropout=0.5)
    model = load(folders, "sd3", tuning)
    disturb(model.policy)
    whole = velocity(model)
    with tuning.in_update(model.policy, seed=1, step=4):
        one, two = velocity(model), velocity(model)
        kept, again = gradients(model), gradients(model, inputs=True)
    with tuning.in_update(model.policy, seed=1, step=4):
        same = velocity(model)
    with tuning.in_update(model.policy, seed=1, step=5):
        other = velocity(model)
    assert torch.equal(one, two) and torch.equal(one, same)
    assert not torch.equal(one, other) and not torch.equal(one, whole)
    assert torch.equal(velocity(model), whole)  # outside of an update there is none
    for name, grad in kept.items():  # recomputed in the backward: the same mask
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6)


def test_dropout_scales_what_it_keeps(folders):
    """By hand on one layer: W x + B A (m x) / (1 - p), m of the right share."""
    tuning = LoRA(rank=2, dropout=0.25, alpha=4.0)
    model = load(folders, "flux", tuning)
    disturb(model.policy)
    layer = lora_layers(model.policy)["single_transformer_blocks.0.proj_out"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, A.shape[1])
    with tuning.in_update(model.policy, seed=1, step=0):
        mask = layer.lora_dropout["default"].mask
        y = layer(x)
    m = (mask > 0).float()
    assert 0.6 < float(m.mean()) < 0.9
    torch.testing.assert_close(y, layer.base_layer(x) + 2.0 * (m * x / 0.75) @ A.T @ B.T)
    assert not any(".mask" in name for name in model.policy.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_the_sum(folders, family, tmp_path):
    model = load(folders, family, LoRA(rank=2, alpha=4.0))
    disturb(model.policy)
    plain = merged(model.policy)
    assert type(plain) is type(model.policy) and not lora_layers(plain)
    torch.testing.assert_close(velocity(replace(model, policy=plain)), velocity(model), rtol=1e-4, atol=1e-4)
    assert merged(plain) is plain
    with pytest.raises(UserError, match="hold no copy"), replace(model, policy=plain).reference():
        pass


def test_merging_into_bfloat16_rounds_once(folders):
    """|merged - (W + s B A)| <= 2^-8 |W + s B A|, and a small adapter is rounded away where the sum keeps it."""
    model = load(folders, "sd3", LoRA(rank=2, alpha=4.0), "bfloat16")
    for size, lost in ((0.2, False), (1e-5, True)):
        disturb(model.policy, size)
        plain = dict(merged(model.policy).named_parameters())
        unchanged = []
        for name, layer in lora_layers(model.policy).items():
            W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            exact = W.double() + 2.0 * B.double() @ A.double()
            found = plain[f"{name}.weight"]
            assert found.dtype == torch.bfloat16
            assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
            unchanged.append((found == W).float().mean())
        assert (float(torch.stack(unchanged).mean()) > 0.9) == lost


def test_a_quantised_base_is_not_merged(folders):
    policy = copy.copy(load(folders, "sd3", LoRA(rank=1)).policy)
    policy.hf_quantizer = object()  # what diffusers sets
    with pytest.raises(UserError, match=r"quantised base\. If the run quantised it, `leapalign export"):
        merged(policy)


def test_the_saved_state_has_the_scale_in_it(folders):
    model = load(folders, "sd3", LoRA(rank=2, alpha=8.0))
    disturb(model.policy)
    state = adapter_state(model.policy)
    fresh = load(folders, "sd3", LoRA(rank=2))
    restore(fresh.policy, state, "here")
    torch.testing.assert_close(velocity(fresh), velocity(model), rtol=1e-5, atol=1e-5)
    layers = len(lora_layers(model.policy))
    assert len(state) == 2 * layers and all(value.dtype == torch.float32 for value in state.values())
    first = next(iter(state))
    with pytest.raises(UserError, match="not those of the run's adapter"):
        restore(fresh.policy, {k: v for k, v in state.items() if k != first}, "here")
    with pytest.raises(UserError, match="the run's adapter has"):
        restore(fresh.policy, state | {first: torch.zeros(5, 5)}, "here")


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"base_dtype": "bfloat16"}, "float32", "a bfloat16 base computes in bfloat16"),
        ({"quantization": "int8"}, "float32", "set the run's dtype to bfloat16"),
        ({"target_modules": ("to_queue",)}, "float32", "no linear layer"),
    ],
)
def test_what_cannot_work_is_refused(folders, settings, dtype, message):
    with pytest.raises(UserError, match=message):
        load(folders, "sd3", LoRA(**settings), dtype)


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"alpha": -1.0}, {"alpha": math.inf}, {"dropout": 1.0}, {"target_modules": ("",)}]
)
def test_numbers_are_checked(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        LoRA(**settings)


def test_only_the_named_layers_are_trained(folders):
    model = load(folders, "flux", LoRA(rank=1, target_modules=("single_transformer_blocks.*.to_q", "x_embedder")))
    assert list(lora_layers(model.policy)) == [
        "x_embedder",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.attn.to_q",
    ]


def test_the_folder_is_opened_like_any_other(folders):
    """The adapter needs no more of a folder than full fine-tuning does."""
    config = FAMILIES["flux"].config(folders["flux"])
    assert isinstance(config, Flux)
    folder = open_folder(config.path, "FluxPipeline", ("transformer",))
    policy = LoRA(rank=1).load_policy(folder, "cpu", torch.float32, Flux.lora_targets)
    assert sum(p.requires_grad for p in policy.parameters()) == 2 * len(adapter.lora_layers(policy))

"""A base in 8 or 4 bits, run on the CPU where torchao and bitsandbytes are (`make test-quantization`).

What is exact is asked exactly: velocity and gradients are those of a bfloat16 base that holds the rounded weights. How
far the rounding itself leads away is a bound: on the weights, and on the velocity.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_pipelines as tiny
from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.models.sd3 import SD3
from leapalign.planning.plan import make_plan
from leapalign.run import Run
from leapalign.storage.files import sha256
from leapalign.training import direct, loop
from leapalign.tuning import quantization
from leapalign.tuning.adapter import lora_layers
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES, PROMPTS, disturb, generators


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_torchao = pytest.mark.skipif(not has("torchao"), reason="make test-quantization installs torchao")
needs_bitsandbytes = pytest.mark.skipif(not has("bitsandbytes"), reason="make test-quantization installs bitsandbytes")
KINDS = [pytest.param("int8", marks=needs_torchao), pytest.param("nf4", marks=needs_bitsandbytes)]


@pytest.fixture(autouse=True)
def four_bits_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demand for a GPU is patched away and nothing else: layers, kernels and gradients are bitsandbytes' own."""
    if not has("bitsandbytes"):
        return
    from bitsandbytes.nn import modules
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    monkeypatch.setattr(quantization, "_refuse_without_gpu", lambda: None)  # ours
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)  # diffusers', first line
        monkeypatch.setattr(kind, "update_device_map", lambda self, found: {"": "cpu"})  # else: the current GPU
    # On some CPUs a forward without gradient repacks the weights for good, which no GPU does.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


# What is asked of diffusers


def test_none_is_no_configuration():
    assert quantization.quantization_config("none") is None


@pytest.mark.parametrize(("kind", "package"), quantization.PACKAGES.items())
def test_a_missing_package_is_named(kind, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{kind} needs the package {package}: pip install 'leapalign"):
        quantization.quantization_config(kind)


@needs_torchao
def test_a_package_that_lacks_something_is_a_sentence(monkeypatch):
    def old() -> Any:
        raise ImportError("cannot import name 'Int8WeightOnlyConfig'")

    monkeypatch.setattr(quantization, "_int8", old)
    with pytest.raises(UserError, match=r"this torchao cannot be used \(cannot import name 'Int8.*upgraded"):
        quantization.quantization_config("int8")


def test_nf4_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="nf4 needs a GPU"):
        quantization.quantization_config("nf4")


@needs_bitsandbytes
def test_nf4_asks_diffusers_for_four_bits_and_bfloat16():
    config = quantization.quantization_config("nf4")
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_what_a_quantised_folder_needs_is_told(folders, tmp_path, monkeypatch):
    """Not "copy the folder again", where the package or the GPU is missing."""
    monkeypatch.undo()
    copy = Path(shutil.copytree(folders["sd3"], tmp_path / "copy"))
    file = copy / "transformer" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    model = FAMILIES["sd3"].config(str(copy))
    with pytest.raises(UserError, match=r"quantised by bitsandbytes, which needs .* and a GPU; install that, or give"):
        model.load("cpu", "float32", LoRA())
    with pytest.raises(UserError, match=r"is quantised already \(by bitsandbytes\), so quantization int8 would not be"):
        model.load("cpu", "bfloat16", LoRA(quantization="int8"))


# Values and gradients


def rounded(layer: Any) -> Tensor:
    """The weights that a quantised layer computes with."""
    if type(layer.weight).__name__ == "Int8Tensor":
        return layer.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def linear_layers(policy: Any) -> dict[str, Any]:
    return {n: m for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" not in n}


def load(config: Any, kind: Any) -> Any:
    """With an adapter that has values."""
    model = config.load("cpu", "bfloat16", LoRA(rank=2, quantization=kind))
    disturb(model.policy)
    return model


def forward_and_backward(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity, and the gradients of its square in x and in the adapter."""
    x = model.noise(generators()).requires_grad_()
    v = model.velocity(model.encode(PROMPTS))(x, torch.tensor(0.6))
    v.square().sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
    return v.detach(), x.grad, grads


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_with_the_rounded_weights(folders, family, kind):
    config = FAMILIES[family].config(folders[family])
    model, plain = load(config, kind), load(config, "none")
    there = linear_layers(plain.policy)
    for name, layer in linear_layers(model.policy).items():
        assert type(layer.weight).__name__ == {"int8": "Int8Tensor", "nf4": "Params4bit"}[kind], name
        there[name].weight.data.copy_(rounded(layer))
        if kind == "int8":  # torchao multiplies by whole numbers first and scales what comes out: another rounding
            x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
            assert distance(there[name](x).float(), layer(x).float()) < 0.01, name
    for quantised, expected in zip(forward_and_backward(model), forward_and_backward(plain)):
        assert torch.equal(quantised, expected) if kind == "nf4" else distance(expected, quantised) < 0.15


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SD3 whose layers take multiples of 64 features: others come back wrong from bitsandbytes' kernel for CPUs."""
    pipeline = tiny.sd3_pipeline(joint_width=64, head_dim=32, clip_widths=(32, 32))
    tiny.randomise(pipeline.transformer, seed=1, gain=0.7)  # what a layer rounds is not made larger by the next ones
    return tiny.save(pipeline, tmp_path_factory.mktemp("wide"))


def config_of(folder: str) -> SD3:
    return SD3(path=folder, height=16, width=24, guidance_scale=3.0, max_sequence_length=5)


BOUNDS = {"int8": (0.01, 0.05), "nf4": (0.11, 0.35)}  # of a layer's weights, of velocity and gradients; relative


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_near_to_bfloat16_as_its_bits_allow(wide, kind):
    model, plain = load(config_of(wide), kind), load(config_of(wide), "none")
    weights, results = BOUNDS[kind]
    there = linear_layers(plain.policy)
    for name, layer in linear_layers(model.policy).items():
        assert weights / 4 < distance(there[name].weight.float(), rounded(layer).float()) < weights, name
    for expected, quantised in zip(forward_and_backward(plain), forward_and_backward(model)):
        print(f"{kind}: {distance(expected, quantised):.3f}")
        assert 1e-3 < distance(expected, quantised) < results


# A run


@pytest.fixture
def quantised_run(run: Run, wide: str) -> Run:
    tuning = LoRA(rank=2, alpha=4.0, dropout=0.2)
    return replace(run, model=config_of(wide), dtype="bfloat16", tuning=tuning)


def of_kind(run: Run, kind: Any, **changes: Any) -> Run:
    return replace(run, tuning=replace(run.tuning, quantization=kind), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_changes_nothing(quantised_run, kind):
    grads = []
    for graph in ("all", "blocks", "inputs"):
        engine = loop.build(of_kind(quantised_run, kind, graph=graph))
        disturb(engine.model.policy)
        direct.update(engine, 0)
        grads.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]))
    assert grads[0].norm() > 1e-3
    for other in grads[1:]:
        assert distance(grads[0], other) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_quantised_base(wide, kind):
    base, model = config_of(wide).load("cpu", "bfloat16", LoRA(rank=2, quantization=kind)), load(config_of(wide), kind)
    x, sigma = model.noise(generators()), torch.tensor(0.6)
    with model.reference():
        v = model.velocity(model.encode(PROMPTS))(x, sigma)
    with torch.no_grad():
        assert torch.equal(v, base.velocity(base.encode(PROMPTS))(x, sigma))
        assert not torch.equal(v, model.velocity(model.encode(PROMPTS))(x, sigma))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_reloads_and_exports(quantised_run, wide, kind, tmp_path, capsys):
    whole = of_kind(quantised_run, kind, checkpoint_every=1)
    result = loop.train(whole)
    cut = replace(whole, steps=1, out=str(tmp_path / "cut"))
    loop.train(cut)
    resumed = loop.train(replace(cut, steps=2), resume=True)
    file = "pytorch_lora_weights.safetensors"
    assert sha256(result.saved / file) == sha256(resumed.saved / file)  # bit for bit

    engine, policy = result.engine, result.engine.model.policy
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    for name in ("weights", "ema"):  # never the base
        tensors = load_file(result.out / "checkpoints" / "step-000002" / f"{name}.safetensors")
        assert tensors.keys() == trained and {t.dtype for t in tensors.values()} == {torch.float32}

    with torch.no_grad():  # the saved average, opened again over the same base: quantised as in the run, or not
        for name, value in engine.ema.shadow.items():
            engine.parameters[name].copy_(value)
        x, sigma = engine.model.noise(generators()), torch.tensor(0.6)
        v = engine.model.velocity(engine.model.encode(PROMPTS))(x, sigma)
        again = whole.tuning.load_tuned(whole.model, str(result.saved), "cpu", "bfloat16")
        assert distance(v, again.velocity(again.encode(PROMPTS))(x, sigma)) < 1e-2  # the scale 2 is in B: rounding
        exact = whole.tuning.load_tuned(whole.model, str(result.saved), "cpu", "float32")
        assert {p.dtype for p in exact.policy.parameters()} == {torch.float32}

    with pytest.raises(UserError, match=r"quantised base\. If the run quantised it, `leapalign export"):
        engine.model.save(tmp_path / "merged")
    target = tmp_path / "pipeline"
    assert main(["export", whole.out, "--out", str(target), "--format", "pipeline"]) == 0
    weights, base = (
        load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (target, wide)
    )
    changed = [name for name in base if not torch.equal(weights[name], base[name])]
    layers = lora_layers(policy)
    # into the weights of the base's folder: what has no adapter is there bit for bit, not rounded to so many bits
    assert weights.keys() == base.keys() and set(changed) <= {f"{name}.weight" for name in layers}
    state = load_file(result.saved / file)
    for name in layers:
        A, B = (state[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(weights[f"{name}.weight"], base[f"{name}.weight"] + B @ A, rtol=0, atol=1e-6)
    assert main(["sample", whole.out, "--prompt", "a red circle", "--out", f"{tmp_path}/a", "--device", "cpu"]) == 0


SAVED = [
    pytest.param("torchao int8", marks=needs_torchao),
    pytest.param("bitsandbytes nf4", marks=needs_bitsandbytes),
    pytest.param("bitsandbytes int8", marks=needs_bitsandbytes),
]


def saved_quantised(folder: str, kind: str, to: Path) -> str:
    """Copy the folder, its transformer quantised and saved by diffusers."""
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel

    settings = {
        "torchao int8": lambda: quantization.quantization_config("int8"),
        "bitsandbytes nf4": lambda: quantization.quantization_config("nf4"),
        "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }[kind]()
    model = SD3Transformer2DModel.from_pretrained(
        f"{folder}/transformer", quantization_config=settings, torch_dtype=torch.bfloat16
    )
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("transformer"))
    model.save_pretrained(to / "transformer")
    return str(to)


@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_that_was_saved_quantised(run, wide, kind, tmp_path, capsys):
    """A LoRA trains over it and is told so; the other ways to use it work or say what it is."""
    folder, method = saved_quantised(wide, kind, tmp_path / "base"), kind.split()[0]
    if kind != "bitsandbytes int8":  # which no run can choose
        on_loading = load(config_of(wide), kind.split()[1])
        found = forward_and_backward(load(config_of(folder), "none"))
        assert all(map(torch.equal, found, forward_and_backward(on_loading)))
    lora = replace(run, model=config_of(folder), dtype="bfloat16", steps=1)
    loop.train(lora)
    told = capsys.readouterr().err
    assert f"the base is quantised already (by {method}): the adapter is trained beside" in told
    assert told.count("MatMul8bitLt") <= 1  # not once a layer and forward
    twice = LoRA(quantization="int8")
    for tuning, message in ((FULL, "full fine-tuning needs the unquantised"), (twice, "int8 would not be applied")):
        with pytest.raises(UserError, match=message):
            loop.train(replace(lora, tuning=tuning, out=f"{tmp_path}/refused"))
        with pytest.raises(UserError, match=message):
            make_plan(replace(lora, tuning=tuning, out=f"{tmp_path}/refused"))
    words = ["--prompt", "a", "--size", "16", "--steps", "1", "--device", "cpu"]
    assert main(["sample", lora.out, "--prompt", "a", "--device", "cpu", "--out", f"{tmp_path}/tuned"]) == 0
    assert main(["sample", folder, *words, "--out", f"{tmp_path}/plain"]) == 0
    assert main(["export", lora.out, "--out", f"{tmp_path}/lora", "--format", "lora"]) == 0
    capsys.readouterr()
    assert main(["export", lora.out, "--out", f"{tmp_path}/merged", "--format", "pipeline"]) == 2
    assert "cannot be merged into a quantised base" in capsys.readouterr().err


def held(tensor: Any) -> int:
    """Bytes of a weight with all that belongs to it."""
    if type(tensor).__name__ == "Int8Tensor":
        return sum(t.numel() * t.element_size() for t in (tensor.qdata, tensor.scale))
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() * tensor.element_size() + (4 * state.absmax.numel() if state else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_its_bytes(quantised_run, kind):
    run = of_kind(quantised_run, kind)
    policy = loop.build(run).model.policy
    real = sum(held(tensor) for tensor in (*policy.parameters(), *policy.buffers()))
    assert make_plan(run).memory["transformer"] == pytest.approx(real, rel=1e-9)


@needs_torchao
def test_a_single_file_is_not_quantised(quantised_run, wide):
    file = Path(wide) / "transformer" / "diffusion_pytorch_model.safetensors"
    model = replace(quantised_run.model, transformer_file=str(file))
    with pytest.raises(UserError, match="a single file is not quantised; give the transformer's folder"):
        model.load("cpu", "bfloat16", LoRA(rank=2, quantization="int8"))

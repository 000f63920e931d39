"""Training that begins with an adapter's values: layouts, strength, what is refused, and a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub_cache import lay_out
from leapalign.checkpoint.inputs import differing, inputs_of
from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.planning.plan import make_plan
from leapalign.run import Run
from leapalign.storage import components
from leapalign.storage.files import sha256
from leapalign.training import loop
from leapalign.tuning.files import FILE
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES, PROMPTS, disturb, generators, our_images, pipeline_images

SIGMA = torch.tensor(0.6)
DOUBLE = tuple(f"transformer_blocks.*.{layer}" for layer in ("attn.*", "ff.net.*", "ff_context.net.*"))


def begun(folder: str, family: str, tuning: LoRA) -> Any:
    model = FAMILIES[family].config(folder).load("cpu", "float32", tuning)
    tuning.initialise(model.policy, seed=0)
    return model


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    return model.velocity(model.encode(PROMPTS))(model.noise(generators()), SIGMA)


def saved(folder: str, family: str, tuning: LoRA, to: Path) -> Tensor:
    """The velocity of an adapter that is then saved."""
    model = begun(folder, family, tuning)
    disturb(model.policy)
    to.mkdir()
    tuning.save(model, to)
    return velocity(model)


def stored(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> str:
    file.parent.mkdir(exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file, metadata=metadata)
    return str(file)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_the_saved_model_and_the_reference_its_base(
    folders: dict[str, str], family: str, tmp_path: Path
) -> None:
    tuned = saved(folders[family], family, LoRA(rank=2, alpha=4.0), tmp_path / "sft")
    base = velocity(FAMILIES[family].config(folders[family]).load("cpu", "float32"))
    for alpha, start in ((0.0, "sft"), (4.0, f"sft/{FILE}"), (3.0, "sft")):  # the file's alpha is its rank
        model = begun(folders[family], family, LoRA(rank=2, alpha=alpha, start=str(tmp_path / start)))
        torch.testing.assert_close(velocity(model), tuned, rtol=1e-5, atol=1e-5)
        with model.reference():
            assert torch.equal(velocity(model), base)
    assert not torch.allclose(tuned, base, atol=1e-2)


def test_peft_layout_with_its_config(folders: dict[str, str], tmp_path: Path) -> None:
    """alpha, a pattern of alphas and rank-stabilised scaling are those of adapter_config.json."""
    saved(folders["flux"], "flux", LoRA(rank=4), tmp_path / "sft")
    plain = load_file(tmp_path / "sft" / FILE)
    renamed = {name.replace("transformer.", "base_model.model.", 1): value for name, value in plain.items()}
    config = {"lora_alpha": 6.0, "alpha_pattern": {"ff.net.2": 8.0}, "use_rslora": True, "init_lora_weights": True}
    start = stored(renamed, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"whose alpha is in .*adapter_config.json; that file is missing"):
        begun(folders["flux"], "flux", LoRA(rank=4, start=start))
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    for name in plain:
        if name.endswith(".lora_B.weight"):
            plain[name] *= (8.0 if name.endswith("ff.net.2.lora_B.weight") else 6.0) / 2
    expected = begun(folders["flux"], "flux", LoRA(rank=4, start=stored(plain, tmp_path / "scaled.safetensors")))
    found = begun(folders["flux"], "flux", LoRA(rank=4, alpha=1.0, start=str(tmp_path / "peft")))
    torch.testing.assert_close(velocity(found), velocity(expected), rtol=1e-5, atol=1e-5)
    for key, value, message in (("use_dora", True, "is a DoRA"), ("init_lora_weights", "pissa", "changes the base")):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            begun(folders["flux"], "flux", LoRA(rank=4, start=start))


def test_diffusers_metadata_says_the_strength(folders: dict[str, str], tmp_path: Path) -> None:
    """As diffusers' own loader reads it: alpha 6 of rank 2 is a scale of 3."""
    saved(folders["sd3"], "sd3", LoRA(rank=2), tmp_path / "sft")
    tensors = load_file(tmp_path / "sft" / FILE)
    layers = [name.split(".lora_")[0].removeprefix("transformer.") for name in tensors]
    config = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.target_modules": sorted(set(layers))}
    start = stored(tensors, tmp_path / "meta" / FILE, {"lora_adapter_metadata": json.dumps(config)})
    ours = our_images(begun(folders["sd3"], "sd3", LoRA(rank=2, start=start)))
    assert (ours - pipeline_images(FAMILIES["sd3"], folders["sd3"], tmp_path / "meta")).abs().max() < 1e-4
    assert (ours - pipeline_images(FAMILIES["sd3"], folders["sd3"], tmp_path / "sft")).abs().max() > 1e-3


def kohya(diffusers: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Layers of FLUX's double blocks under the names of sd-scripts; q, k and v are one layer with one A."""
    own = {"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp_0"}
    own |= {"ff.net.2": "img_mlp_2", "ff_context.net.0.proj": "txt_mlp_0", "ff_context.net.2": "txt_mlp_2"}
    qkv = {"img_attn_qkv": ("to_q", "to_k", "to_v"), "txt_attn_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    found = {}
    for block in {name.split(".")[2] for name in diffusers}:
        layer = {name.removeprefix(f"transformer.transformer_blocks.{block}."): t for name, t in diffusers.items()}
        pairs = {new: (layer[f"{old}.lora_A.weight"], layer[f"{old}.lora_B.weight"]) for old, new in own.items()}
        for new, olds in qkv.items():
            up = torch.cat([layer[f"attn.{old}.lora_B.weight"] for old in olds])
            pairs[new] = layer[f"attn.{olds[0]}.lora_A.weight"], up
        for new, (down, up) in pairs.items():
            name = f"lora_unet_double_blocks_{block}_{new}"
            found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def test_kohya_layout_is_read_as_diffusers_reads_it(folders: dict[str, str], tmp_path: Path) -> None:
    saved(folders["flux"], "flux", LoRA(rank=2, target_modules=DOUBLE), tmp_path / "sft")
    start = stored(kohya(load_file(tmp_path / "sft" / FILE), alpha=1.0), tmp_path / "kohya" / FILE)
    ours = our_images(begun(folders["flux"], "flux", LoRA(rank=2, alpha=6.0, target_modules=DOUBLE, start=start)))
    theirs = pipeline_images(FAMILIES["flux"], folders["flux"], tmp_path / "kohya")
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - pipeline_images(FAMILIES["flux"], folders["flux"])).abs().max() > 1e-3
    with pytest.raises(
        UserError, match=r"lora_unet_.* which belongs to no supported layout .*: supported are diffusers' layout"
    ):
        begun(folders["sd3"], "sd3", LoRA(rank=2, start=start))  # diffusers converts none for SD3


def test_what_is_no_adapter_of_the_run_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    saved(folders["sd3"], "sd3", LoRA(rank=2), tmp_path / "sft")
    good = load_file(tmp_path / "sft" / FILE)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    A, B = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    fewer = {name: value for name, value in good.items() if ".ff" not in name}
    more = good | {"transformer.proj_out.lora_A.weight": good[A], "transformer.proj_out.lora_B.weight": good[B]}
    wrong = {
        r"has \d+ layers, the run's adapter \d+; missing: \d+ \(.*ff.*\), unexpected: 0\. Set target_modules": fewer,
        r"missing: 0, unexpected: 1 \(proj_out\)": more,
        r"has no transformer_blocks.0.attn.to_q.lora_B.weight": {k: v for k, v in good.items() if k != B},
        r"the rank is 3 at .*, the run's is 2; use --tuning.rank 3": good
        | {A: torch.ones(3, good[A].shape[1]), B: torch.ones(good[B].shape[0], 3)},
        r"to_q.lora_A.weight is \(2, 7\), the run's adapter has": good | {A: torch.ones(2, 7)},
        r"values that are not finite": good | {A: torch.full_like(good[A], torch.nan)},
        r"changes a text encoder too": good | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
        r"no supported layout of a LoRA": good | {f"{layer}.dora_scale": torch.ones(2)},
        r"is empty": {},
    }
    for message, tensors in wrong.items():
        with pytest.raises(UserError, match=message):
            begun(folders["sd3"], "sd3", LoRA(rank=2, start=stored(tensors, tmp_path / "wrong.safetensors")))
    (tmp_path / "none").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sft" / FILE).read_bytes()[:-8])
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    files = {
        "none": "found none",
        "absent.safetensors": "file not found",
        "lora.bin": "pickled",
        "cut.safetensors": "announces",
    }
    for name, message in files.items():
        with pytest.raises(UserError, match=message):
            begun(folders["sd3"], "sd3", LoRA(rank=2, start=str(tmp_path / name)))


def test_a_wrong_start_is_told_before_the_base_is_loaded(
    run: Run, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by --dry-run, which loads no base at all."""
    saved(folders["sd3"], "sd3", LoRA(rank=2), tmp_path / "sft")
    good = load_file(tmp_path / "sft" / FILE)
    wrong = {
        "is empty": {},
        "changes a text encoder": good | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
        "no supported layout": {name.replace("transformer.", "diffusion_model."): t for name, t in good.items()},
        "whose alpha is in": {name.replace("transformer.", "base_model.model."): t for name, t in good.items()},
        "the rank is 2 at .*, the run's is 3; use --tuning.rank 2": good,
    }
    monkeypatch.setattr(components, "load_policy", lambda *_: pytest.fail("the base was loaded"))
    for message, tensors in wrong.items():
        tuning = LoRA(rank=3, start=stored(tensors, tmp_path / "wrong.safetensors"))
        with pytest.raises(UserError, match=message):
            begun(folders["sd3"], "sd3", tuning)
        with pytest.raises(UserError, match=message):
            make_plan(replace(run, tuning=tuning))


def test_a_hub_id_is_a_start(
    run: Run, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = saved(folders["sd3"], "sd3", LoRA(rank=2), tmp_path / "sft")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    named = LoRA(rank=2, start="org/lora@v2")
    with pytest.raises(UserError, match=r"org/lora@v2: HF_HUB_OFFLINE forbids the network"):
        begun(folders["sd3"], "sd3", named)
    plan = make_plan(replace(run, tuning=named))  # fetches nothing, and says what is to be fetched
    (needed,) = (d for d in plan.downloads if d.repo == "org/lora@v2")
    assert needed.what == FILE and not needed.cached and needed.bytes > 0
    lay_out(tmp_path / "sft", tmp_path / "hub", "org/lora", revision="v2")
    assert torch.equal(velocity(begun(folders["sd3"], "sd3", named)), tuned)
    assert next(d for d in make_plan(replace(run, tuning=named)).downloads if d.repo == "org/lora@v2").cached
    assert "tuning.start" in inputs_of(replace(run, tuning=named), [])
    lay_out(Path(folders["sd3"]) / "vae", tmp_path / "hub", "org/other")
    with pytest.raises(UserError, match=r"org/other: the repository has no pytorch_lora_weights.safetensors and no"):
        begun(folders["sd3"], "sd3", LoRA(start="org/other"))
    with pytest.raises(UserError, match=r"sft/absent.safetensors: file not found"):  # no hub id
        begun(folders["sd3"], "sd3", LoRA(start="sft/absent.safetensors"))


def test_a_run_goes_on_from_the_adapter(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Five steps and five are ten, the file is an input of the run, and what is saved needs it no more."""
    start = tmp_path / "sft"
    saved(run.model.path, "sd3", LoRA(rank=2, alpha=4.0), start)
    begin = replace(run.tuning, start=str(start))  # pyright: ignore[reportCallIssue]
    whole = replace(run, model=replace(run.model, guidance_scale=1.0), tuning=begin, steps=4, checkpoint_every=2)
    cut = replace(whole, out=str(tmp_path / "cut"))
    first = inputs_of(whole, [])
    assert "tuning.start" in first
    loop.train(whole)
    loop.train(replace(cut, steps=2))
    loop.train(cut, resume=True)
    assert sha256(Path(cut.out) / "lora" / FILE) == sha256(Path(whole.out) / "lora" / FILE)
    moved = load_file(Path(whole.out) / "lora" / FILE), load_file(start / FILE)
    change = [(moved[0][name] - moved[1][name]).norm() / moved[1][name].norm() for name in moved[0]]
    assert 0 < max(change) < 0.5  # from the adapter, not from zero
    other = {name: value + 1 for name, value in moved[1].items()}
    save_file(other, start / FILE)
    assert any("tuning.start" in line for line in differing(first, inputs_of(whole, [])))
    (start / FILE).unlink()
    for weights in ("average", "live"):
        words = ["export", whole.out, "--out", f"{tmp_path}/{weights}", "--format", "pipeline", "--weights", weights]
        assert main(words) == 0, capsys.readouterr().err


def test_the_command_line_begins_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--num-sampling-steps", "3"]
    words = ["train", "shapeworld-leapalign-lora", *flags, "--evaluate-every", "0", "--device", "cpu"]
    assert main([*words, "--tuning.rank", "4", "--out", f"{tmp_path}/sft"]) == 0
    more = ["--tuning.start", f"{tmp_path}/sft/lora", "--out", f"{tmp_path}/more"]
    assert main([*words, "--tuning.rank", "4", *more]) == 0
    capsys.readouterr()
    assert main([*words, "--tuning.rank", "2", *more[:3], f"{tmp_path}/wrong"]) == 2
    assert "use --tuning.rank 4" in capsys.readouterr().err

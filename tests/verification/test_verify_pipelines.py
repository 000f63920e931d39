"""`leapalign verify` of a pipeline: nothing to say of good folders, and each way of spoiling one is found by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import tiny_pipelines as tiny
from hub_cache import lay_out, share
from leapalign.cli import main
from leapalign.models import FAMILIES as MODEL_FAMILIES
from leapalign.models import sd3
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3
from leapalign.verification import known
from leapalign.verification.checks import Check
from leapalign.verification.files import read_hashes
from leapalign.verification.pipelines import Trial, check_architecture, check_pipeline
from lora_families import FAMILIES

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TRIAL = Trial(prompt="a red circle", num_steps=2, size=16, seed=1, device="cpu")


def check(folder: Path, hashes: Path | None = None) -> list[Check]:
    index = json.loads((folder / "model_index.json").read_text())
    config: Any = Flux if index["_class_name"] == Flux.pipeline else SD3
    settings = {"guidance_scale": 2.0, "max_sequence_length": 5}
    return check_pipeline(config(path=str(folder), **settings), TRIAL, read_hashes(str(hashes)) if hashes else None)


def differing(checks: list[Check]) -> dict[tuple[str, str], str]:
    return {(c.part, c.check): c.came for c in checks if c.state == "different"}


def write_hashes(folder: Path, target: Path) -> Path:
    """As `find . -type f | xargs sha256sum` does."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  ./{f.relative_to(folder)}" for f in files]
    target.write_text("\n".join(lines) + "\n")
    return target


def test_good_folder_by_the_command(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = write_hashes(flux_folder, tmp_path / "sums")
    argv = ["verify", str(flux_folder), "--size", "16", "--steps", "2", "--hashes", str(hashes)]
    assert main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["good"] and answer["kind"] == "pipeline"
    states = {(c["part"], c["check"]): c["state"] for c in answer["checks"]}
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert {states[part, what] for what in ("files", "keys and shapes", "number types", "values")} == {"good"}
    assert states["tokenizer", "tokenizer"] == states["tokenizer_2", "tokenizer"] == "good"
    for what in ("opens", "latents, ours and the pipeline's own", "pixels, ours and the pipeline's own"):
        assert states["sampler", what] == "good"
    assert states["vae", "decodes"] == states["all components", "hash"] == states["scheduler", "kind"] == "good"

    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "sums").write_text("0" * 64 + "  model_index.json\n")
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out and "NOT as it should be" in out and "what to do" in out and "model_index.json has" in out


# ---- spoiled folders: (part, check) -> words of what came


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file)

    return spoil


def config(file: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))

    return spoil


def set_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["proj_out.weight"][0, 0] = float("nan")


def truncate(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def no_weights(folder: Path) -> None:
    (folder / VAE).rename(folder / "vae" / "weights.bin")


def no_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def other_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    tiny.t5_tokenizer().save_pretrained(folder / "tokenizer")


def larger_tokenizer(folder: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    tokenizer.add_tokens([f"more{n}" for n in range(9)])
    tokenizer.save_pretrained(folder / "tokenizer_2")


def poor_tokenizer(folder: Path) -> None:
    """Of another language: it has no letters for the prompt."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "z</w>": 2}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tiny.CLIP_LENGTH).save_pretrained(folder / "tokenizer")


def missing_shard(folder: Path) -> None:
    weights, part = load_file(folder / TRANSFORMER), folder / "transformer"
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listed = {key: names[i % 2] for i, key in enumerate(weights)}
    save_file({key: weights[key] for key in weights if listed[key] == names[0]}, part / names[0])
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (folder / TRANSFORMER).unlink()


def exchanged_shards(folder: Path) -> None:
    """Both shards are there, and one key is in the other one than the index says."""
    missing_shard(folder)
    part = folder / "transformer"
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    weights = tiny.sd3_pipeline(with_t5=False).transformer.state_dict()
    names = sorted(set(listed.values()))
    save_file({key: weights[key].contiguous() for key in listed if listed[key] == names[1]}, part / names[1])
    key = next(iter(listed))
    index.write_text(json.dumps({"weight_map": {**listed, key: names[1]}}))


SPOILED: dict[str, tuple[Callable[[Path], None], tuple[str, str], str]] = {
    "missing key": (
        tensors(TRANSFORMER, lambda w: w.pop("proj_out.bias")), ("transformer", "keys"), "1 missing: proj_out.bias"
    ),
    "extra key": (
        tensors(TRANSFORMER, lambda w: w.update(lora_A=torch.ones(2))),
        ("transformer", "keys"),
        "1 that SD3Transformer2DModel does not know: lora_A",
    ),
    "wrong shape": (
        tensors(TRANSFORMER, lambda w: w.update({"proj_out.bias": torch.ones(3)})),
        ("transformer", "shapes"),
        r"proj_out.bias \[3\] instead of \[16\]",
    ),
    "key of a text encoder": (
        tensors("text_encoder/model.safetensors", lambda w: w.pop("text_projection.weight")),
        ("text_encoder", "keys"),
        "1 missing: text_projection.weight",
    ),
    "shape in a text encoder": (
        tensors("text_encoder/model.safetensors", lambda w: w.update({"text_projection.weight": torch.ones(3, 3)})),
        ("text_encoder", "shapes"),
        r"text_projection.weight \[3, 3\] instead of \[8, 8\]",
    ),
    "number type": (
        tensors(VAE, lambda w: w.update({"decoder.conv_in.bias": w["decoder.conv_in.bias"].double()})),
        ("vae", "number types"),
        "1 F64; e.g. decoder.conv_in.bias",
    ),
    "lost precision": (
        tensors(VAE, lambda w: w.update({"decoder.conv_in.bias": w["decoder.conv_in.bias"].half()})),
        ("vae", "number types"),
        "1 F16; e.g. decoder.conv_in.bias",
    ),
    "NaN": (tensors(TRANSFORMER, set_nan), ("transformer", "values"), "NaN or infinity in proj_out.weight"),
    "truncated": (truncate, ("text_encoder", "files"), "model.safetensors has .* bytes, its header announces"),
    "no weights": (no_weights, ("vae", "files"), "no safetensors"),
    "no part": (no_component, ("vae", "folder"), "lacks the folder vae"),
    "other layers": (
        config("transformer/config.json", num_layers=3),
        ("transformer", "keys"),
        "32 missing: transformer_blocks.1"
    ),
    "config of nothing": (config("vae/config.json", block_out_channels=7), ("vae", "keys"), "TypeError"),
    "other scheduler": (
        config("model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"]),
        ("scheduler", "kind"),
        "scheduler EulerDiscreteScheduler; expected FlowMatch",
    ),
    "stochastic scheduler": (
        config("scheduler/scheduler_config.json", stochastic_sampling=True),
        ("scheduler", "kind"),
        "stochastic_sampling on",
    ),
    "unknown class": (config("model_index.json", vae=["diffusers", "NoSuchVAE"]), ("vae", "folder"), "NoSuchVAE"),
    "tokenizer of another class": (other_tokenizer, ("tokenizer", "tokenizer"), "files of a T5Tokenizer"),
    "tokenizer of a larger model": (larger_tokenizer, ("tokenizer_2", "tokenizer"), "254 entries"),
    "tokenizer that garbles": (poor_tokenizer, ("tokenizer", "tokenizer"), "says '.*' for 'a red circle'"),
    "missing shard": (missing_shard, ("transformer", "files"), "00002-of-00002.safetensors is missing"),
    "exchanged shards": (exchanged_shards, ("transformer", "shards"), "index.json and its files differ in "),
    "picture of one colour": (
        tensors(VAE, lambda w: w["decoder.conv_out.weight"].zero_()), ("vae", "decodes"), "deviation 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folder(name: str, sd3_folder: Path, tmp_path: Path) -> None:
    import re

    spoil, where, came = SPOILED[name]
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "copy"))
    spoil(folder)
    checks = check(folder)
    found = differing(checks)
    assert where in found and re.search(came, found[where]), found
    assert all(c.expected and (c.remedy or c.part == "sampler") for c in checks if c.state == "different")
    parts = {part for part, _ in found} - {"sampler", "vae"}
    assert parts <= {where[0]}  # nothing else is blamed


def test_tokenizer_of_few_words_is_no_difference(sd3_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "copy"))
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "z</w>": 3}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tiny.CLIP_LENGTH).save_pretrained(folder / "tokenizer")
    checks = check(folder)
    assert not differing(checks)
    assert any(c.part == "tokenizer" and c.state == "note" and "knows 'a' of" in c.came for c in checks)


def test_embedded_model_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "embedded:generator", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["good"]


def test_good_folders_have_no_difference(sd3_folder: Path) -> None:
    assert not differing(check(sd3_folder))


def test_changed_file_is_found_by_a_list_of_hashes(sd3_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "copy"))
    hashes = write_hashes(folder, tmp_path / "sums")
    weights = load_file(folder / VAE)
    weights["encoder.conv_in.bias"][0] += 1e-3  # nothing else could tell
    save_file(weights, folder / VAE)
    (folder / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "added.txt").touch()
    checks = check(folder, hashes)
    assert differing(checks)["all components", "hash"].startswith((VAE, "tokenizer/special"))
    assert any("added.txt" in c.came for c in checks if c.state == "note")


def test_hubs_cache_knows_the_hashes(sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = lay_out(sd3_folder, tmp_path, "org/tiny")
    checks = check_pipeline(SD3(path="org/tiny", max_sequence_length=5), TRIAL, None)
    assert not differing(checks)
    assert any(c.check == "hash" and c.expected == "those that the hub recorded" for c in checks)
    for file in (snapshot / VAE, snapshot / "tokenizer" / "tokenizer.json"):
        blob, before = file.resolve(), file.read_bytes()
        blob.write_bytes(
            before.replace(b"conv_in.bias", b"conv_in.bIas") if file.suffix == ".safetensors" else before + b" "
        )
        wrong = [
            c for c in check_pipeline(SD3(path="org/tiny", max_sequence_length=5), TRIAL, None) if c.check == "hash"
        ]
        assert any(c.state == "different" and str(file.relative_to(snapshot)) in c.came for c in wrong)
        blob.write_bytes(before)
    share(snapshot / VAE)
    (found,) = (
        c for c in check_pipeline(SD3(path="org/tiny", max_sequence_length=5), TRIAL, None) if c.check == "hash"
    )
    assert found.came == f"{len(list(filter(Path.is_file, snapshot.rglob('*'))))} files"  # none of them unknown


@pytest.mark.parametrize("family", ["flux2", "qwen-image", "z-image"])
def test_a_good_folder_of_the_other_families(family: str, tmp_path: Path) -> None:
    """Latents are compared too, in our layout, whatever the pipeline returns."""
    config = FAMILIES[family].config(tiny.save(FAMILIES[family].build(), tmp_path / family))
    checks = check_pipeline(config, TRIAL, None)
    assert differing(checks) == {}
    (latents,) = (c for c in checks if c.check.startswith("latents"))
    assert latents.state == "good" and float(latents.came) < float(latents.expected.split()[-1]) / 10
    wrong = replace(config, guidance_scale=1.0) if family != "flux2" else replace(config, text_layers=(2, 1, 4))
    arguments = config.call_arguments(TRIAL.num_steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "call_arguments", lambda *_: arguments)
        assert ("sampler", "latents, ours and the pipeline's own") in differing(check_pipeline(wrong, TRIAL, None))


def test_another_sampler_is_found(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that is not the pipeline's: what a wrong adapter would do."""
    monkeypatch.setattr(sd3, "sigma_grid", lambda config, scheduler, num_steps, *_: torch.linspace(1, 0, num_steps + 1))
    found = differing(check(sd3_folder))
    assert found.keys() == {
        ("sampler", "latents, ours and the pipeline's own"),
        ("sampler", "pixels, ours and the pipeline's own"),
    }


# ---- published models, by their numbers alone


MODELS = [(family, model) for family in MODEL_FAMILIES for model in known.models_of(family.published)]


def write_configs(folder: Path, model: known.Known, **changes: Any) -> Path:
    for part, file, content in (
        ("transformer", "config.json", {**model.transformer, **changes}),
        ("scheduler", "scheduler_config.json", dict(model.scheduler)),
    ):
        (folder / part).mkdir(parents=True)
        (folder / part / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("family", "model"), MODELS, ids=[model.names[0] for _, model in MODELS])
def test_published_models_are_recognised_and_their_figures_told(
    family: Any, model: known.Known, tmp_path: Path
) -> None:
    folder = write_configs(tmp_path, model)
    checks = check_architecture(model.names[0], folder, family.published)
    assert not differing(checks) and model.names[0] in checks[0].came
    told = " ".join(c.came for c in check_architecture("here", folder, family.published))
    assert [f"{score:g}" for f in model.figures for score in f.scores.values() if f"{score:g}" not in told] == []


def test_the_papers_figures_are_those_of_its_tables() -> None:
    figures = {model.names: {f.where.partition(":")[0]: f.scores for f in model.figures} for _, model in MODELS}
    flux = figures["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"]
    assert flux["Table 3"] == {"hpsv3": 10.7624} and set(flux) == {"Table 2", "Table 3"}
    assert figures[("stabilityai/stable-diffusion-3.5-medium",)]["Table 4"]["pickscore logit"] == 22.5189
    assert len(known.of_reward("hpsv3")) == 3 and len(known.of_reward("geneval")) == 1


def test_other_numbers_under_a_published_name_and_another_shift(tmp_path: Path) -> None:
    flux = known.by_id("black-forest-labs/FLUX.1-dev", Flux.published)
    assert flux is not None
    folder = write_configs(tmp_path / "schnell", flux, guidance_embeds=False)
    found = differing(check_architecture("black-forest-labs/FLUX.1-dev@main", folder, Flux.published))
    assert "guidance_embeds" in found["transformer", "architecture"]
    assert "use_dynamic_shifting" in found["scheduler", "numbers"]  # schnell's transformer with dev's scheduler
    folder = write_configs(tmp_path / "shifted", flux)
    config("scheduler/scheduler_config.json", shift=1.0)(folder)
    assert differing(check_architecture("here", folder, Flux.published)) == {("scheduler", "numbers"): "{'shift': 1.0}"}


# ---- the user's mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: folder not found"),
        (["org/none"], "org/none: HF_HUB_OFFLINE forbids the network"),
        (["."], "is not a diffusers pipeline folder"),
        (["pickscore=nowhere"], "no file or folder is there"),
        (["pickscore"], "PickScore_v1"),
        (["ocr=org/none/deeper"], "no file or folder is there"),
        (["embedded:generator", "--hashes", "nowhere"], "cannot be read as a list of hashes"),
        (["embedded:generator", "--hashes", "wrong"], "wrong, line 1: expected a sha256 and a path"),
        (["embedded:generator", "--hashes", "empty"], "the file has no hashes"),
    ],
)
def test_mistakes(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong").write_text("no hash\n")
    Path("empty").write_text("\n")
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err


def test_finished_run_is_verified_at_its_own_size(
    sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from leapalign.codec import dumps
    from leapalign.recipes import shapeworld_leapalign

    model = SD3(path="base", height=24, width=24, max_sequence_length=5, guidance_scale=2.0)
    run = replace(shapeworld_leapalign(), model=model, out=str(tmp_path))
    (tmp_path / "run.json").write_text(dumps(run))
    shutil.copytree(sd3_folder, tmp_path / "pipeline")
    assert main(["verify", str(tmp_path), "--steps", "2", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert any(c["check"] == "opens" and c["came"].startswith("24 x 24, 2 steps") for c in checks)


def test_a_run_that_leaves_an_adapter_is_verified_by_its_base(
    sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from leapalign.codec import dumps
    from leapalign.recipes import shapeworld_leapalign
    from leapalign.tuning.lora import LoRA

    model = SD3(path=str(sd3_folder), height=24, width=24, max_sequence_length=5, guidance_scale=2.0)
    run = replace(shapeworld_leapalign(), model=model, out=str(tmp_path), tuning=LoRA(rank=2))
    (tmp_path / "run.json").write_text(dumps(run))
    (tmp_path / "lora").mkdir()
    assert main(["verify", str(tmp_path), "--steps", "2", "--json"]) == 0
    (told,) = [c for c in json.loads(capsys.readouterr().out)["checks"] if c["check"] == "adapter"]
    assert told["state"] == "note" and str(sd3_folder) in told["came"]

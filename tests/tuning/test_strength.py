"""Strength: weights on the line through base and tuned model, in exports, samples and evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_pipelines as tiny
from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.lookup.sources import Source, find_source
from leapalign.run import Run
from leapalign.storage.files import sha256
from leapalign.training import loop
from leapalign.tuning.files import FILE
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA
from leapalign.tuning.strength import interpolate
from lora_families import FAMILIES, disturb, our_images, pipeline_images

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
Export = Callable[..., Path]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the transformer's config.json, in which diffusers writes the path that it was loaded from."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: digest for name, digest in files.items() if name != "transformer/config.json"}


@pytest.fixture
def full(run: Run) -> Run:
    """One update of all weights, from a base of the test's own."""
    tiny.save(tiny.sd3_pipeline(), Path(run.out).parent / "base")
    own = replace(run.model, path=str(Path(run.out).parent / "base"))
    trained = replace(run, model=own, tuning=FULL, steps=1)
    loop.train(trained)
    return trained


@pytest.fixture
def lora(run: Run) -> Run:
    loop.train(run)
    return run


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture) -> Export:
    """export(run, *flags) -> the exported folder."""
    count = iter(range(100))

    def command(run: Run, *flags: str) -> Path:
        target = tmp_path / f"exported-{next(count)}"
        assert main(["export", run.out, "--out", str(target), *flags]) == 0, capsys.readouterr().err
        return target

    return command


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / WEIGHTS)


def expected(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """Second derivation, in float64."""
    return (1 - strength) * base.double() + strength * tuned.double()


def test_interpolation_is_linear_exact_at_both_ends_and_reads_every_shard(tmp_path: Path) -> None:
    tuned = {name: torch.randn(p.shape) for name, p in torch.nn.Linear(5, 7).state_dict().items()}
    for name, value in tuned.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    for strength in (0.0, 0.5, 1.0, 1.25, 2.0):
        layer = torch.nn.Linear(5, 7)
        base = {name: value.clone() for name, value in layer.state_dict().items()}
        interpolate(layer, tmp_path, strength)
        for name, value in layer.state_dict().items():
            if strength in (0, 1):
                assert torch.equal(value, (base, tuned)[int(strength)][name])
            wanted = expected(base[name], tuned[name], strength).float()
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


def test_a_base_of_other_names_or_shapes_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(7, 5), "bias": torch.zeros(7)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"weight is \(7, 5\), the base's is \(7, 4\); use the base"):
        interpolate(torch.nn.Linear(4, 7), tmp_path, 0.5)
    with pytest.raises(UserError, match=r"not those of the base, for instance bias"):
        interpolate(torch.nn.Linear(5, 7, bias=False), tmp_path, 0.5)
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot be opened.*copy the run's folder again"):
        interpolate(torch.nn.Linear(5, 7), tmp_path, 0.5)


@pytest.mark.parametrize("which", ["average", "live"])
def test_a_fully_tuned_run_between_base_and_tuned_model(full: Run, export: Export, which: str) -> None:
    flags = ("--weights", which)
    tuned, base = export(full, *flags), weights(full.model.path)
    one = export(full, *flags, "--strength", "1")
    assert digests(one) == digests(tuned)
    if which == "average":  # and these are the saved ones, to the bit
        assert sha256(tuned / WEIGHTS) == sha256(Path(full.out, "pipeline") / WEIGHTS)
    none, half = (weights(export(full, *flags, "--strength", s)) for s in ("0", "0.5"))
    changed = 0
    for name, end in weights(tuned).items():
        assert torch.equal(none[name], base[name])
        torch.testing.assert_close(half[name], expected(base[name], end, 0.5).float(), rtol=0, atol=1e-7)
        changed += not torch.equal(half[name], end)
    assert changed > 10


def test_an_exported_folder_says_what_it_is(full: Run, export: Export, capsys: pytest.CaptureFixture) -> None:
    folder = export(full, "--strength", "0.5", "--dtype", "bfloat16")
    assert "pipeline, bfloat16, average weights at strength 0.5" in capsys.readouterr().out
    assert json.loads((folder / "export.json").read_text()) == {
        "run": full.name,
        "format": "pipeline",
        "weights": "average",
        "dtype": "bfloat16",
        "strength": 0.5,
    }
    assert {t.dtype for t in weights(folder).values()} == {torch.bfloat16}


@pytest.mark.parametrize("which", ["average", "live"])
def test_an_adapter_is_scaled_in_B_or_merged_with_its_scale(lora: Run, export: Export, which: str) -> None:
    flags = ("--weights", which)
    tuned = export(lora, *flags, "--format", "lora")
    assert digests(export(lora, *flags, "--format", "lora", "--strength", "1")) == digests(tuned)
    state = load_file(tuned / FILE)
    half = load_file(export(lora, *flags, "--format", "lora", "--strength", "0.5") / FILE)
    for name, value in state.items():
        assert torch.equal(half[name], 0.5 * value if ".lora_B." in name else value)
    merged, base = weights(export(lora, *flags, "--strength", "0.5")), weights(lora.model.path)
    none = weights(export(lora, *flags, "--strength", "0"))
    for name, value in base.items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        assert torch.equal(none[name], value)
        if f"{layer}.lora_B.weight" in state:
            value = value + 0.5 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3", "flux", "z-image"])
def test_the_strength_of_an_adapter_is_its_weight_in_diffusers(
    folders: dict[str, str], family: str, tmp_path: Path
) -> None:
    case, tuning = FAMILIES[family], LoRA(rank=2, alpha=3.0)
    config = case.config(folders[family])
    model = config.load("cpu", "float32", tuning)
    disturb(model.policy)
    tuning.save(model, tmp_path)
    ours = our_images(tuning.load_tuned(config, str(tmp_path), "cpu", "float32", 0.5))
    theirs = pipeline_images(case, folders[family], tmp_path, weight=0.5)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - our_images(model)).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sample_and_evaluate_at_a_strength(
    kind: str, request: pytest.FixtureRequest, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run: Run = request.getfixturevalue(kind)
    words = ["--prompts", run.prompts.path, "--device", "cpu", "--steps", "2", "--json"]
    capsys.readouterr()
    assert main(["evaluate", run.out, "--strength", "0", "--against", run.out, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strength"] == 0 and found["rewards"]["pickscore"]["difference"] != 0  # --against is as trained

    sample = ["--prompt", "a red circle", "--device", "cpu", "--steps", "2", "--size", "16"]
    images = {}
    for strength in ("0.5", "1"):
        assert main(["sample", run.out, "--strength", strength, "--out", f"{tmp_path}/{strength}", *sample]) == 0
        images[strength] = digests(tmp_path / strength)
    assert images["0.5"] != images["1"]
    base = run.model.load("cpu", "float32")
    assert torch.equal(our_images(find_source(run.out, {}, 0.0).load("cpu", "float32")), our_images(base))
    exported = replace(run.model, path=str(export(run, "--strength", "0.5"))).load("cpu", "float32")
    loaded = find_source(run.out, {}, 0.5).load("cpu", "float32")
    assert (our_images(exported) - our_images(loaded)).abs().max() < 1e-4


def test_images_of_another_strength_are_not_continued(full: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--prompts", full.prompts.path, "--device", "cpu", "--steps", "2", "--out", f"{tmp_path}/images"]
    assert main(["evaluate", full.out, *words]) == 0
    assert "strength" not in (tmp_path / "images" / "images.json").read_text()  # as in folders of earlier versions
    assert main(["evaluate", full.out, *words, "--strength", "0.5"]) == 2
    assert "strength" in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["-0.1", "2.1", "nan"])
def test_a_strength_out_of_range_is_refused(
    lora: Run, strength: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    commands = [
        ["export", lora.out, "--out", f"{tmp_path}/new"],
        ["export", lora.out, "--out", f"{tmp_path}/new", "--weights", "live"],
        ["sample", lora.out, "--prompt", "a"],
        ["evaluate", lora.out],
    ]
    for argv in commands:
        assert main([*argv, f"--strength={strength}"]) == 2
        assert "it must lie in [0, 2]: 0 is the base" in capsys.readouterr().err


def test_a_model_that_is_no_run_has_no_base(capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", "embedded:generator", "--prompt", "a", "--strength", "0.5"]) == 2
    assert "give a run, or leave out --strength" in capsys.readouterr().err


def test_a_base_that_is_replaced_or_gone_is_refused_for_all_weights(
    full: Run, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = Path(full.model.path)
    tensors = weights(base)
    save_file({name: 2 * value for name, value in tensors.items()}, base / WEIGHTS)
    for which in ("average", "live"):
        words = ["--out", f"{tmp_path}/new", "--strength", "0.5", "--weights", which]
        assert main(["export", full.out, *words]) == 2
        message = capsys.readouterr().err
        assert "the base is not the one that this run was trained on" in message
        assert f"model.path: {WEIGHTS.as_posix()} changed" in message and "use a strength of 1" in message
    export(full)  # as trained: the base is not asked for
    base.rename(tmp_path / "elsewhere")
    assert main(["sample", full.out, "--prompt", "a", "--strength", "0.5"]) == 2
    assert "not found. Put it back at" in capsys.readouterr().err
    (Path(full.out) / "inputs.json").unlink()  # a run without that record
    assert main(["sample", full.out, "--prompt", "a", "--strength", "0.5"]) == 2
    assert "folder not found" in capsys.readouterr().err
    export(full)


def test_an_adapter_on_another_base_is_told_by_every_command(
    lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Path(lora.out) / "inputs.json"
    text = json.loads(record.read_text())
    text["inputs"]["model.path"][WEIGHTS.as_posix()] = "0" * 64
    record.write_text(json.dumps(text))
    with pytest.warns(UserWarning, match="the base is not the one that this run was trained on"):
        find_source(lora.out, {}, 0.5)

    def stop(*_: object, **__: object) -> None:
        raise UserError("told, and here the work would begin")

    monkeypatch.setattr(Source, "load", stop)
    monkeypatch.setattr(LoRA, "export", stop)
    commands = [
        ["sample", lora.out, "--prompt", "a", "--out", f"{tmp_path}/images"],
        ["evaluate", lora.out, "--per-task", "1", "--diversity", "0"],
        ["evaluate", "embedded:generator", "--against", lora.out, "--per-task", "1", "--diversity", "0"],
        ["export", lora.out, "--out", f"{tmp_path}/average"],
        ["export", lora.out, "--out", f"{tmp_path}/live", "--weights", "live"],
    ]
    for argv in commands:
        with pytest.warns(UserWarning, match="the base is not the one that this run was trained on"):
            assert main(argv) == 2

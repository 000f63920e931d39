"""Runs with an adapter, end to end: training, resuming, what is saved, and every command that opens it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leapalign.cli import main
from leapalign.methods.draft import DRaFT
from leapalign.models.flux import Flux
from leapalign.prompts import Prompt
from leapalign.rewards.clip import CLIPScore
from leapalign.run import Run
from leapalign.storage.files import sha256
from leapalign.studies.before_after import Study, conduct
from leapalign.training import direct, loop
from leapalign.tuning.adapter import lora_layers
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES, disturb, our_images, pipeline_images


def digests(out: str | Path) -> dict[str, str]:
    folder = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    return {path.name: sha256(path) for path in folder.glob("*.safetensors")} | {"step": folder.name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_steps_equal_five_and_five(run: Run, tmp_path: Path, dtype: Any) -> None:
    short = replace(run, model=replace(run.model, guidance_scale=1.0), batch_size=2, num_sampling_steps=2)
    whole = replace(short, steps=10, dtype=dtype, tuning=LoRA(rank=2, dropout=0.2))
    cut = replace(whole, steps=5, out=str(tmp_path / "cut"))
    loop.train(whole)
    loop.train(cut)
    loop.train(replace(cut, steps=10), resume=True)
    assert digests(cut.out) == digests(whole.out)
    saved = [sha256(Path(out) / "lora" / "pytorch_lora_weights.safetensors") for out in (cut.out, whole.out)]
    assert saved[0] == saved[1]


def test_checkpoints_and_average_hold_the_adapter_alone(run: Run) -> None:
    result = loop.train(replace(run, dtype="bfloat16"))
    engine, policy = result.engine, result.engine.model.policy
    expected = {n for n, p in policy.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    folder = result.out / "checkpoints" / "step-000002"
    for name in ("weights", "ema"):
        tensors = load_file(folder / f"{name}.safetensors")
        assert tensors.keys() == expected and {t.dtype for t in tensors.values()} == {torch.float32}
        header = (folder / f"{name}.safetensors").stat().st_size - 4 * count
        assert 0 < header < 200 * len(expected)  # names and shapes; the frozen base would be far more
    assert sum(p.numel() for p in policy.parameters()) > 2 * count
    saved = load_file(result.saved / "pytorch_lora_weights.safetensors")
    for name, value in engine.ema.shadow.items():  # the averages, and the scale 2 in B
        scale = 2.0 if ".lora_B." in name else 1.0
        assert torch.equal(saved["transformer." + name.replace(".default.", ".")], scale * value)
        assert not torch.equal(value, engine.parameters[name]) or "1.attn.add_q_proj" in name  # SD3's unused queries
    assert result.summary["lora"] == str(result.saved) and "pipeline" not in result.summary
    with pytest.raises(Exception, match="leapalign export"):
        _ = result.pipeline


def test_the_loss_falls(run: Run) -> None:
    """One batch again and again, by the last step's gradient: the adapter is trained in the right direction."""
    engine = loop.build(replace(run, method=DRaFT(num_last_steps=2), steps=1, learning_rate=3e-3))
    first = direct.update(engine, 0)["loss"]
    for _ in range(5):
        last = direct.update(engine, 0)["loss"]
    assert last < first - 0.02, (first, last)
    assert all(bool(p.any()) for n, p in engine.parameters.items() if ".lora_B." in n and "1.attn.add_q" not in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_and_graph_change_nothing(run: Run, folders: dict[str, str], family: str) -> None:
    model = replace(FAMILIES[family].config(folders[family]), height=16, width=16)
    base = replace(run, model=model, batch_size=8, tuning=LoRA(rank=2, dropout=0.3))
    settings = [(8, "all"), (4, "all"), (1, "all"), (2, "blocks"), (2, "inputs")]
    grads = []
    for micro, graph in settings:
        engine = loop.build(replace(base, micro_batch_size=micro, graph=graph))  # pyright: ignore
        disturb(engine.model.policy)  # with B = 0 there is no gradient in A
        direct.update(engine, 0)
        # Qwen-Image's last block throws its text away: no gradient there
        grads.append({name: p.grad for name, p in engine.parameters.items() if p.grad is not None})
    size = torch.stack([grad.norm() for grad in grads[0].values()]).norm()
    assert size > 1e-3
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            assert (other[name] - grad).norm() < 1e-4 * size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_the_file_and_draws_the_same_picture(
    folders: dict[str, str], family: str, tmp_path: Path
) -> None:
    case, tuning = FAMILIES[family], LoRA(rank=2, alpha=3.0)
    model = case.config(folders[family]).load("cpu", "float32", tuning)
    disturb(model.policy)
    (tmp_path / "lora").mkdir()
    tuning.save(model, tmp_path / "lora")
    ours, theirs = our_images(model), pipeline_images(case, folders[family], tmp_path / "lora")
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - pipeline_images(case, folders[family])).abs().max() > 0.05  # the adapter is seen
    model.save(tmp_path / "merged")
    assert (ours - pipeline_images(case, tmp_path / "merged")).abs().max() < 1e-4


@pytest.fixture
def finished(run: Run) -> Run:
    loop.train(run)
    return run


def test_sample_evaluate_and_export_a_run(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = finished.out
    assert main(["sample", out, "--prompt", "a red circle", "--out", f"{tmp_path}/a", "--device", "cpu"]) == 0
    for form, file in (
        ("pipeline", "model_index.json"),
        ("lora", "pytorch_lora_weights.safetensors"),
    ):
        capsys.readouterr()
        assert main(["export", out, "--out", f"{tmp_path}/{form}", "--format", form, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["format"] == form and answer["bytes"] > 0 and (tmp_path / form / file).is_file()
    words = ["evaluate", out, "--prompts", finished.prompts.path, "--device", "cpu", "--steps", "3", "--json"]
    assert main([*words, "--against", out]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"]["pickscore"]["difference"] == 0
    merged = replace(finished.model, path=f"{tmp_path}/pipeline").load("cpu", "float32")
    tuned = finished.tuning.load_tuned(finished.model, f"{out}/lora", "cpu", "float32")
    assert (our_images(merged) - our_images(tuned)).abs().max() < 1e-4
    assert not any(p.requires_grad for p in tuned.policy.parameters())


def test_export_in_bfloat16_halves_and_refuses_what_cannot_be(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, there = finished.out, str(tmp_path / "half")
    assert main(["export", out, "--out", there, "--format", "lora", "--dtype", "bfloat16"]) == 0
    assert "lora, bfloat16" in capsys.readouterr().out
    tensors = load_file(f"{there}/pytorch_lora_weights.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    mistakes = {
        "is not overwritten": ["export", out, "--out", there],
        "cannot read the run": ["export", there, "--out", f"{there}-2"],
    }
    for message, argv in mistakes.items():
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    (Path(finished.out) / "lora").rename(Path(finished.out) / "elsewhere")
    assert main(["export", out, "--out", f"{there}-3"]) == 2
    assert "it has no lora yet" in capsys.readouterr().err


def test_a_fully_tuned_run_exports_its_pipeline(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from leapalign.tuning.full import FULL

    full = replace(run, tuning=FULL, steps=1)
    loop.train(full)
    assert main(["export", full.out, "--out", f"{tmp_path}/x", "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "x" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert main(["export", full.out, "--out", f"{tmp_path}/y", "--format", "lora"]) == 2
    assert "tuning 'full' has no lora to export; use --format pipeline" in capsys.readouterr().err


def test_live_weights_are_exported_without_their_average_also_of_an_unfinished_run(
    finished: Run, tmp_path: Path
) -> None:
    newest = load_file(Path(finished.out) / "checkpoints" / "step-000002" / "weights.safetensors")
    shutil.rmtree(Path(finished.out) / "lora")
    there = tmp_path / "new" / "live"
    assert main(["export", finished.out, "--out", str(there), "--format", "lora", "--weights", "live"]) == 0
    exported = load_file(there / "pytorch_lora_weights.safetensors")
    for name, value in newest.items():  # the scale 2 is in B
        scale = 2.0 if ".lora_B." in name else 1.0
        assert torch.equal(exported["transformer." + name.replace(".default.", ".")], scale * value)
    assert [path.name for path in there.parent.iterdir()] == ["live"]


def test_live_weights_of_a_fully_tuned_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from leapalign.tuning.full import FULL

    full = replace(run, tuning=FULL, steps=1)
    loop.train(full)
    words = ["--out", f"{tmp_path}/live", "--weights", "live"]
    assert main(["export", full.out, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "live"
    exported = load_file(tmp_path / "live" / "transformer" / "diffusion_pytorch_model.safetensors")
    newest = load_file(Path(full.out) / "checkpoints" / "step-000001" / "weights.safetensors")
    average = load_file(Path(full.out) / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert newest.keys() <= exported.keys() and all(torch.equal(exported[n], v) for n, v in newest.items())
    assert any(not torch.equal(exported[name], average[name]) for name in newest)
    shutil.rmtree(Path(full.out) / "checkpoints" / "step-000001")
    (Path(full.out) / "checkpoints" / "newest.json").unlink()
    assert main(["export", full.out, "--out", f"{tmp_path}/none", "--weights", "live"]) == 2
    assert "this run has no checkpoint yet" in capsys.readouterr().err


def test_the_demo_compares_base_and_adapter(run: Run, reward_folder: Path) -> None:
    study = Study(
        run=replace(run, learning_rate=0.05),
        held_out=CLIPScore(path=str(reward_folder)),
        prompts=[Prompt(text="a red circle", metadata={"tag": "colors"})],
        detector=None,
        command="leapalign demo",
    )
    summary = conduct(study)
    assert summary["lora"] == f"{run.out}/lora" and summary["reward"]["before"] != summary["reward"]["after"]


def test_flux_trains_with_every_switch_that_saves_memory(run: Run, folders: dict[str, str]) -> None:
    """bfloat16 base and reward, inputs only, decoded one by one: what a card of 24 GB would use."""
    model = Flux(path=folders["flux"], height=16, width=16, max_sequence_length=5, decode_chunk=1)
    rewards = tuple(replace(term, dtype="bfloat16") for term in run.rewards)
    small = replace(run, model=model, rewards=rewards, dtype="bfloat16", graph="inputs", reward_chunk=1, steps=1)
    result = loop.train(small)
    policy = result.engine.model.policy
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert result.summary["skipped"] == 0 and len(lora_layers(policy)) == 34


def test_the_recipe_trains_the_embedded_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "run")
    flags = ["--steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--num-sampling-steps", "3"]
    words = ["train", "shapeworld-leapalign-lora", *flags, "--tuning.rank", "4", "--evaluate-every", "0"]
    assert main([*words, "--out", out, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"] == f"{out}/lora"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["tuning"]["rank"] == 4 and record["tuning"]["type"] == "leapalign.tuning.lora.LoRA"

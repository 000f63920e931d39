"""The loop on real diffusers and transformers classes, tiny and random: what a user's run does, end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_pipelines
from leapalign.cli import main
from leapalign.codec import dumps, loads
from leapalign.methods.alignprop import AlignProp
from leapalign.methods.draft import DRaFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.storage.files import sha256
from leapalign.training import direct, loop
from leapalign.tuning.lora import LoRA
from tiny_clip import write_tiny_clip

METHODS = [LeapAlign(), ReFL(), DRaFT(), DRaFTLV(), DRTune(), AlignProp()]
FLOWBP = [FlowBPSparse(), FlowBPBridge(num_training_steps=3, nested_scale=0.5), FlowBPLagrange()]
NEWER = [*FLOWBP, RSM()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """sd3/, flux/, clip/ and prompts.txt."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(), folder / "sd3")
    tiny_pipelines.save(tiny_pipelines.flux_pipeline(), folder / "flux")
    write_tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a red circle\na blue square\ntwo green star\n")
    return folder


@pytest.fixture
def run(parts, tmp_path) -> Run:
    return Run(
        name="sd3",
        model=SD3(path=str(parts / "sd3"), height=16, width=24, guidance_scale=3.0, max_sequence_length=8),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=PickScore(path=str(parts / "clip")), threshold=2.0),),
        prompts=PromptFile(path=str(parts / "prompts.txt")),
        out=str(tmp_path / "run"),
        steps=2,
        batch_size=4,
        micro_batch_size=2,
        num_sampling_steps=4,
        learning_rate=1e-3,
        ema_decay=0.5,
        checkpoint_every=1,
        evaluation_size=2,
        device="cpu",
    )


def last_state(out: str | Path) -> dict[str, str]:
    folder = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    return {path.name: sha256(path) for path in folder.glob("*.safetensors")}


def test_the_tuned_pipeline_opens_in_diffusers(run, parts):
    from diffusers import StableDiffusion3Pipeline

    result = loop.train(run)
    pipeline = StableDiffusion3Pipeline.from_pretrained(result.pipeline)
    base = load_file(parts / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors")
    tuned = pipeline.transformer.state_dict()
    for name, value in result.engine.ema.shadow.items():
        assert torch.equal(tuned[name], value)
    assert sum(not torch.equal(tuned[name], base[name]) for name in base) > 0.9 * len(base)
    assert loads((result.out / "run.json").read_text(), Run) == run


def test_resume_is_exact(run, tmp_path):
    loop.train(replace(run, steps=4))
    cut = replace(run, out=str(tmp_path / "cut"))
    loop.train(cut)
    loop.train(replace(cut, steps=4), resume=True)
    assert last_state(cut.out) == last_state(run.out)


@pytest.mark.parametrize("method", [*METHODS, *NEWER], ids=lambda m: m.name)
def test_every_method_moves_the_weights(run, method):
    engine = loop.build(replace(run, method=method, anchor_weight=0.5 if method in NEWER else 0.0))
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    step = 0
    while (metrics := direct.update(engine, step))["skipped"]:  # a draw may leave no gradient
        step += 1
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in engine.parameters.items())


@pytest.mark.parametrize("method", NEWER, ids=lambda m: m.name)
def test_a_killed_lora_run_resumes_exactly(run, tmp_path, method):
    """With true guidance, an average and an anchor; the kill is between two checkpoints."""
    run = replace(run, method=method, tuning=LoRA(rank=2, init="gaussian"), anchor_weight=2.0, steps=5)
    run = replace(run, checkpoint_every=2)
    loop.train(run)
    cut = replace(run, out=str(tmp_path / "cut"))

    def kill(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(cut, on_step=kill)
    loop.train(cut, resume=True)
    assert last_state(cut.out) == last_state(run.out)


@pytest.mark.parametrize("method", [LeapAlign(), *NEWER], ids=lambda m: m.name)
def test_all_graph_settings_give_one_gradient(run, method):
    grads = []
    for graph in ("all", "blocks", "inputs"):
        engine = loop.build(replace(run, graph=graph, method=method, anchor_weight=0.5))
        direct.update(engine, 0)
        grads.append({name: p.grad for name, p in engine.parameters.items()})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-7)


def test_bfloat16_keeps_float32_weights(run):
    engine = loop.build(replace(run, dtype="bfloat16"))
    exact = loop.build(run)
    metrics, reference = direct.update(engine, 0), direct.update(exact, 0)
    assert {p.dtype for p in engine.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in engine.parameters.values() if p.grad is not None} == {torch.float32}
    assert metrics["grad_norm"] != reference["grad_norm"]  # it does compute in bfloat16
    assert metrics["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.2)


def test_flux_trains_too(run, parts):
    flux = Flux(path=str(parts / "flux"), height=16, width=16, max_sequence_length=8)
    result = loop.train(replace(run, model=flux, steps=1))
    assert (result.pipeline / "model_index.json").is_file() and result.summary["skipped"] == 0


def test_sample_and_evaluate_a_finished_run(run, tmp_path, capsys):
    loop.train(run)
    (tmp_path / "run.json").write_text(dumps(run))
    out = str(tmp_path / "pictures")
    words = ["sample", run.out, "--prompt", "a red circle", "a blue square", "--num", "2", "--out", out]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    pictures = json.loads(capsys.readouterr().out)
    assert [p["prompt"] for p in pictures] == ["a red circle"] * 2 + ["a blue square"] * 2
    from PIL import Image

    assert Image.open(pictures[0]["path"]).size == (24, 16)
    assert len({sha256(Path(p["path"])) for p in pictures}) == 4
    assert main([*words, "--device", "cpu"]) == 2  # nothing is overwritten
    assert "exists" in capsys.readouterr().err
    flags = ["--prompts", run.prompts.path, "--device", "cpu", "--json", "--against", run.out]
    assert main(["evaluate", run.out, *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"] == 3 and answer["rewards"]["pickscore"]["difference"] == 0
    assert main(["evaluate", run.out, *flags[:4]]) == 0
    assert "pickscore" in capsys.readouterr().out


def test_an_unfinished_run_cannot_be_sampled(run, capsys):
    Path(run.out).mkdir()
    (Path(run.out) / "run.json").write_text(dumps(run))
    assert main(["sample", run.out, "--prompt", "x"]) == 2
    assert f"leapalign resume {run.out}" in capsys.readouterr().err

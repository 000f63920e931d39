"""Plans: of tiny folders against what a real run has, of published models, and everything that is wrong early."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import tiny_pipelines
from hub_cache import lay_out
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.distributed.fsdp import repeated_blocks
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.rsm import RSM
from leapalign.models.z_image import ZImage
from leapalign.monitors import HeldOut, Monitors, StopWhen
from leapalign.planning import activations
from leapalign.planning import plan as planning
from leapalign.planning.activations import GRAPHS, GraphBytes
from leapalign.planning.downloads import hub_file, pipeline_components
from leapalign.planning.plan import make_plan
from leapalign.recipes import RECIPES
from leapalign.storage.lock import LOCK
from leapalign.training import direct, loop
from leapalign.tuning.lora import LoRA
from lora_families import FAMILIES
from tiny_recipes import tiny, write_folders

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def run(folders, tmp_path):
    return tiny(RECIPES["flux-leapalign-pickscore"](), folders, tmp_path / "run")


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tensor_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_parts_are_those_of_the_loaded_run(run):
    plan, engine = make_plan(run), loop.build(run)
    assert plan.memory["transformer"] == tensor_bytes(engine.model.policy.parameters())
    assert plan.memory["average (EMA, float32)"] == tensor_bytes(engine.ema.shadow.values())
    assert plan.memory["VAE (float32)"] == tensor_bytes(engine.model.decoder.vae.parameters())
    (reward,) = engine.rewards.values()
    assert plan.memory["rewards"] == tensor_bytes(reward.model.parameters())
    rows = engine.model.prompts._rows
    row = next(iter(rows.values()))
    assert (plan.prompts["number"], plan.prompts["bytes_each"]) == (len(rows), tensor_bytes([row.tokens, row.pooled]))
    direct.update(engine, 0)
    moments = [s[key] for s in engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert plan.memory["optimiser (AdamW, two moments)"] == tensor_bytes(moments)
    assert not Path(run.out).exists()


@pytest.mark.parametrize("family", ["flux2", "qwen-image", "z-image"])
def test_a_local_folder_of_the_other_families(run, family, tmp_path, capsys):
    """By its own configurations, from a run.json."""
    case = FAMILIES[family]
    model = replace(case.config(tiny_pipelines.save(case.build(), tmp_path / family)), height=16, width=16)
    (tmp_path / "run.json").write_text(dumps(replace(run, model=model)))
    assert main(["train", str(tmp_path / "run.json"), "--dry-run", "--json"]) == 0
    plan, engine = json.loads(capsys.readouterr().out), loop.build(replace(run, model=model))
    assert plan["memory"]["transformer"] == tensor_bytes(engine.model.policy.parameters())
    assert plan["parameters"]["trained"] == sum(p.numel() for p in engine.model.policy.parameters())
    assert plan["memory"]["VAE (float32)"] == tensor_bytes(engine.model.decoder.vae.parameters())
    rows = list(engine.model.prompts._rows.values())
    sizes = [tensor_bytes([row.tokens]) + (row.mask.numel() if row.mask is not None else 0) for row in rows]
    assert plan["prompts"]["bytes_each"] == max(sizes)  # of the longest prompt here, counted by the tokenizer
    assert not any("planned at its longest" in note for note in plan["notes"])
    assert not any("compared with its published files" in note for note in plan["notes"])


def test_prompts_without_their_tokenizer_are_planned_at_their_longest(run):
    model = ZImage(path="Tongyi-MAI/Z-Image-Turbo", guidance_scale=0.0, height=64, width=64, max_sequence_length=96)
    plan = make_plan(replace(run, model=model))
    assert plan.prompts["bytes_each"] == 96 * (2560 * 2 + 1)  # bfloat16
    assert any("each prompt is planned at its longest, 96 tokens: the tokenizer is not here" in n for n in plan.notes)


def test_the_disk_is_that_of_a_finished_run(run):
    plan, result = make_plan(run), loop.train(run)
    checkpoints = bytes_in(result.out / "checkpoints") / run.keep_checkpoints * (run.keep_checkpoints + 1)
    assert plan.disk["checkpoints"] == pytest.approx(checkpoints, rel=0.25)  # headers weigh much in a tiny file
    assert plan.disk["tuned model"] == pytest.approx(bytes_in(result.pipeline), rel=0.25)


def test_micro_batches_that_wait_for_the_whole_batch_are_counted(run):
    """RSM clips by the batch: states, velocities, x_0 and its gradient of every other micro-batch stay."""
    run = replace(run, method=RSM(), anchor_weight=1.0, micro_batch_size=2)
    plans = [make_plan(replace(run, batch_size=size)) for size in (4, 12)]
    assert plans[0].geometry["forwards"] == 2 * (5 + 5 + 5)  # rollout, trained, the base's
    (numbers,) = {noise.numel() for noise in loop.build(run).model.noise([torch.Generator()])}
    for phase in ("rollout", "decode and reward", "backward"):
        assert plans[1].phases[phase] - plans[0].phases[phase] == 8 * (5 + 5 + 2) * numbers * 4


def test_micro_batches_that_wait_for_the_mean_are_counted(run):
    """Two leaps: 2 of v and 2 of the base for each micro-batch, one for the nested pull, 2 for the inputs alone."""
    run = replace(run, method=LeapAlign(), anchor_mean_weight=1.0, graph="all")
    alone, few, many = (make_plan(replace(run, batch_size=size * run.micro_batch_size)) for size in (1, 2, 6))
    assert [plan.geometry["forwards"] for plan in (alone, few)] == [5 + 3, 2 * (5 + 3 + 2)]
    assert few.graphs["all"].kept < alone.graphs["all"].kept / 2
    (numbers,) = {noise.numel() for noise in loop.build(run).model.noise([torch.Generator()])}
    each = few.graphs["all"].kept + (2 + 2) * numbers * run.micro_batch_size * 4  # x_0, its gradient, two differences
    assert many.phases["rollout"] - few.phases["rollout"] == 4 * each


def test_a_base_in_cpu_memory_is_on_the_device_block_by_block(run):
    run = replace(run, anchor_weight=1.0, dtype="float32")
    plans = {}
    for where in ("device", "cpu"):
        plans[where] = make_plan(replace(run, base_copy=where))
        assert "base of anchor and drift" in plans[where].memory  # the device is the CPU
    blocks = [tensor_bytes(block.parameters()) for block in repeated_blocks(loop.build(run).model.policy)]
    more = plans["cpu"].phases["rollout"] - plans["device"].phases["rollout"]
    assert max(blocks) <= more < plans["cpu"].memory["base of anchor and drift"]
    assert any("of CPU memory, and" in note for note in plans["cpu"].notes)
    away = make_plan(replace(run, base_copy="cpu", device="cuda"))
    assert "base of anchor and drift" not in away.memory
    with pytest.raises(UserError, match="base_copy cpu with sharded weights"):
        make_plan(replace(run, base_copy="cpu", sharding="full"), ranks=2)


def test_the_geometry_counts_forwards(run):
    plan = make_plan(replace(run, method=LeapAlign(num_leaps=3)))
    geometry = plan.geometry
    assert (geometry["accumulations"], geometry["forwards"]) == (2, 2 * 5)
    assert geometry["forwards_with_graph_at_most"] == 2 * 3
    assert list(plan.graphs) == [run.graph] == ["blocks"]


def test_the_geometry_counts_recomputed_forwards_and_those_of_the_anchor(run):
    """T = 2: rollouts of 2, and for each of 3 pairs two in the backward; the base's at both states, and a second one
    at the nested state for the pull alone."""
    method = LeapAlign(pairs_per_rollout=3, step_draws="per-sample")
    run = replace(run, method=method, num_sampling_steps=2)
    assert make_plan(run).geometry["forwards"] == 2 * (2 + 6)
    assert make_plan(replace(run, anchor_weight=1.0)).geometry["forwards"] == 2 * (2 + 6 + 9)
    assert make_plan(replace(run, anchor_weight=1.0, anchor_states="first")).geometry["forwards"] == 2 * (2 + 6 + 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_of_the_anchor_is_that_of_the_loaded_run(run, dtype):
    run = replace(run, anchor_weight=1.0, dtype=dtype)
    held: Any = loop.build(run).anchor.reference  # type: ignore[union-attr]
    assert make_plan(run).memory["base of anchor and drift"] == tensor_bytes(held.__self__.copies.values())


def test_monitors_and_the_best_weights_are_planned(run):
    terms = tuple(HeldOut(reward=term.reward, dtype=term.dtype) for term in run.rewards)
    watched = Monitors(held_out=(*terms, replace(terms[0], device="cpu")), drift_samples=1)
    before, plan = make_plan(run), make_plan(replace(run, monitors=watched, stop_when=StopWhen(evaluations=2)))
    assert plan.memory["held-out rewards"] == before.memory["rewards"] and "held-out rewards" not in before.memory
    anchored = make_plan(replace(run, anchor_weight=1.0))
    assert plan.memory["base of anchor and drift"] == anchored.memory["base of anchor and drift"] > 0
    assert plan.disk["checkpoints"] == before.disk["checkpoints"] * 5 // 4


def test_where_the_graph_does_not_fit_the_smaller_settings_are_measured(run, monkeypatch):
    GB = 10**9
    sizes = {g: GraphBytes(kept=n * GB, rollout=n * GB, backward=n * GB) for g, n in (("all", 40), ("blocks", 20))}
    sizes["inputs"] = GraphBytes(kept=0, rollout=12 * GB, backward=10 * GB)
    monkeypatch.setattr(planning, "graph_bytes", lambda *args: sizes[args[4]])
    monkeypatch.setattr(planning, "_capacity", lambda device: 24 * GB)
    plan = make_plan(replace(run, graph="all"))
    assert plan.graphs == sizes and 40 * GB < plan.peak < 41 * GB  # what all is planned with stays
    (note,) = (note for note in plan.notes if "does not fit" in note)
    assert (
        note
        == "the peak does not fit: cpu has 24.0 GB; graph blocks would need 20.0 GB; graph inputs would need 12.0 GB"
    )
    plan = make_plan(replace(run, graph="blocks"))
    assert list(plan.graphs) == ["blocks"] and not any("does not fit" in note for note in plan.notes)
    monkeypatch.setattr(planning, "_capacity", lambda device: plan.phases["optimiser step"] - 1)  # without any graph
    (note,) = (note for note in make_plan(run).notes if "does not fit" in note)
    assert "see tuning (LoRA, quantization), micro_batch_size" in note


def load_bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_file(str(BENCHES / "plan.py"))


def test_equal_blocks_are_multiplied_exactly(monkeypatch):
    """One and two blocks of each kind, and the rest by multiplication, against all of them."""
    bench, kept = load_bench(), []
    small = bench.Bench(double_blocks=2, single_blocks=3, width=64, side=16, text_tokens=16, sampling_steps=4)
    for graph in GRAPHS:
        monkeypatch.setattr(activations, "ENOUGH", 1)
        short = bench.estimated(small, "flux", "leapalign", "bfloat16", graph, 0)
        monkeypatch.setattr(activations, "ENOUGH", 3)
        assert bench.estimated(small, "flux", "leapalign", "bfloat16", graph, 0) == short
        kept.append(short.kept)
    assert kept[0] > kept[1] > kept[2]


METHODS = dict.fromkeys(["flux2", "qwen-image", "z-image"], ("leapalign",))
METHODS["flux"] = ("leapalign", "pairs, anchored")


@pytest.mark.parametrize("family", METHODS)
def test_estimates_are_near_what_a_real_run_needs(family):
    bench = load_bench()
    sizes = {"double_blocks": 2, "single_blocks": 3, "width": 64, "side": 16, "text_tokens": 16, "sampling_steps": 4}
    small = bench.Bench(**sizes, families=(family,), methods=METHODS[family], dtypes=("bfloat16",))
    for name, row in bench.errors(bench.compare(small)).items():
        assert max(map(abs, row.values())) < bench.BOUND, name
    if family == "flux":
        decoded = bench.decode(small)
        assert decoded["estimated"] == pytest.approx(decoded["measured"], rel=bench.BOUND)


def test_flux_before_any_download(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEAPALIGN_CACHE_GB", "50")
    words = ["train", "flux-leapalign-hpsv21", "--dry-run", "--json", "--device", "cuda", "--graph", "all"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["prompts"]["bytes_each"] == (512 * 4096 + 768) * 2
    assert plan["parameters"]["trained"] == 11_901_408_320
    assert {d["what"] for d in plan["downloads"]} >= {"transformer", "text_encoder_2", "HPS_v2.1_compressed.pt"}
    assert plan["to_download"] == pytest.approx(35.8e9, rel=0.01)
    assert plan["graphs"]["all"]["kept"] == pytest.approx(93.9e9, rel=0.001)  # twice that of all 57 blocks measured
    assert any("gated" in note for note in plan["notes"])
    assert plan["prompts"]["limit"] == 50e9  # of the cache on disk, and what does not fit is said
    assert any("the prompts of this run take 80.7 GB" in note and "50 GB" in note for note in plan["notes"])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_could_not_be_checked_are_called_so(run, monkeypatch):
    """Z-Image before any download; its blocks are not measured here."""
    nothing = GraphBytes(kept=0, rollout=0, backward=0)
    monkeypatch.setattr(planning, "graph_bytes", lambda *args: nothing)
    monkeypatch.setattr(planning, "forward_bytes", lambda *args: 0)
    plan = make_plan(
        replace(run, model=ZImage(path="Tongyi-MAI/Z-Image-Turbo", guidance_scale=0.0, height=64, width=64))
    )
    (note,) = (note for note in plan.notes if "published files" in note)
    assert note.startswith("sizes of Tongyi-MAI/Z-Image-Turbo are approximate")
    assert plan.prompts["bytes_each"] == 512 * (2 * 2560 + 1) and plan.geometry["branches"] == 1
    assert {d.what: round(d.bytes / 1e9, 1) for d in plan.downloads if d.repo.startswith("Tongyi")} == {
        "transformer": 12.3,
        "vae": 0.2,
        "text_encoder": 8.0,
    }


def test_the_plan_as_text(run, capsys, tmp_path):
    (tmp_path / "run.json").write_text(dumps(run))
    assert main(["train", str(tmp_path / "run.json"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("blocks (this run)", "decode and reward", "Prompt cache", "in memory", "checkpoints", "Peak "):
        assert words in text


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert make_plan(RECIPES[name]()).peak > 0


# What is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "gpu"}, "device 'gpu'"),
        ({"num_sampling_steps": 1}, "leaps need 2 steps"),
        ({"model": {"height": 17}}, "height 17 is not a positive multiple"),
        ({"model": {"path": "nobody/nothing"}}, "leapalign does not ship its sizes"),
        ({"model": {"path": "no such folder"}}, "is not a local folder"),
        ({"model": {"max_sequence_length": 0}}, "max_sequence_length 0"),
        ({"prompts": {"path": "absent.txt"}}, "absent.txt: cannot read"),
        ({"reward": {"path": "no such folder"}}, "path is 'no such folder', and no file or folder is there"),
    ],
)
def test_mistakes_are_found_early(run, change, message):
    (key, value), (term,) = next(iter(change.items())), run.rewards
    if key == "reward":
        changed = replace(run, rewards=(replace(term, reward=replace(term.reward, **value)),))
    else:
        changed = replace(run, **{key: replace(getattr(run, key), **value) if isinstance(value, dict) else value})
    with pytest.raises(UserError, match=message):
        make_plan(changed)


def test_a_base_that_is_quantised_already(run, tmp_path):
    copy = shutil.copytree(run.model.path, tmp_path / "copy")
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    quantised = replace(run, model=replace(run.model, path=str(copy)))
    with pytest.raises(UserError, match=r"copy \(torchao\): the base's transformer is quantised already"):
        make_plan(quantised)
    assert any("quantised already (by torchao)" in n for n in make_plan(replace(quantised, tuning=LoRA())).notes)


def test_a_folder_without_weights_and_a_run_that_is_there(run, tmp_path):
    copy = shutil.copytree(run.model.path, tmp_path / "copy")
    next((copy / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="vae has no safetensors"):
        make_plan(replace(run, model=replace(run.model, path=str(copy))))
    Path(run.out).mkdir()
    (Path(run.out) / LOCK).touch()  # left by a run that was refused at its start
    make_plan(run)
    (Path(run.out) / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        make_plan(run)


def test_a_revision_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "files" / "vae").mkdir(parents=True)
    (tmp_path / "files" / "model_index.json").write_text("{}")
    (tmp_path / "files" / "vae" / "x.safetensors").touch()
    lay_out(tmp_path / "files", tmp_path / "hub", "org/tiny", revision="v2")
    cached = [d.cached for d in pipeline_components("org/tiny@v2", {"vae": 1, "transformer": 1})]
    assert cached == [True, False] and hub_file("org/tiny@v2", "model_index.json", 1).cached
    assert not hub_file("org/tiny", "model_index.json", 1).cached

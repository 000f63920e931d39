"""Several ranks: the same numbers as one process, and one end for all. One torchrun launch a number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leapalign.checkpoint import checkpoints, formats, sharded
from leapalign.checkpoint.state import digest
from leapalign.errors import RunStopped, UserError
from leapalign.monitors import HeldOut, Monitors, StopWhen
from leapalign.run import Run
from leapalign.training import loop
from leapalign.training.metrics import BY_STEPS
from leapalign.training.tracking import read_metrics

CASES = Path(__file__).with_name("distributed_cases.py")
pytestmark = pytest.mark.timeout(900)  # all cases run in one launch: minutes on busy cores
SOURCES = str(Path(loop.__file__).parents[2])
LAYOUT = {"replicate": "whole", "full": "sharded", "hybrid": "sharded"}  # of the checkpoints of several ranks
GRAPHS = ("all", "blocks", "inputs")
METHODS = ("leapalign", "refl", "draft-k", "draft-lv", "drtune", "alignprop")
METHODS += ("flowbp-sparse", "flowbp-bridge", "flowbp-lagrange", "rsm")
METHODS += ("flow-grpo", "dance-grpo", "mix-grpo", "flow-dppo", "diffusion-nft", "awm")


def torchrun(ranks: int, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *words]
    path = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def launch(ranks: int, folder: Path, which: str = "") -> dict[str, Any]:
    """Cases on that many ranks: `quick` ones, or all."""
    done = torchrun(ranks, str(CASES), str(folder), which, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="session")
def two_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="session")
def two(two_folder: Path) -> dict[str, Any]:
    return launch(2, two_folder, "quick")


def check(answers: dict[str, Any], ranks: int) -> None:
    """What every launch must have found."""
    left = answers["left to the slow tests"]
    compared = {name: answer for name, answer in answers.items() if "deviation" in answer}
    assert {f"{way} {method}" for way in ("replicate", "full") for method in METHODS} <= compared.keys() | set(left)
    assert {f"replicate {method}" for method in METHODS} | {"full leapalign", "full flow-grpo"} <= compared.keys()
    assert len(compared) + len(left) == 2 * len(METHODS) + 34
    for name, answer in compared.items():
        assert answer["deviation"] < 1e-10 and answer["gradient"] > 1e-4, (name, answer)
    # FSDP2 by itself leaves all of them whole where the model is run again in the backward
    assert {graph: answers["whole at a time"][graph] for graph in GRAPHS} == dict.fromkeys(GRAPHS, 1)
    kills = answers["full, killed in a save"]
    assert kills["equal"]
    for victim in (0, 1):  # killed early: the older one; killed late, or not at all: the newer one
        assert {step for who, _, step in kills["steps"] if who == victim} == {1, 2}
        assert not all(killed for who, killed, _ in kills["steps"] if who == victim)
    assert all(killed for _, killed, step in kills["steps"] if step == 1)
    for way in LAYOUT:
        assert answers[f"{way}, trained"]["silent"]
        bad = answers[f"{way}, NaN on one rank"]
        assert bad["texts"] == ["step 1: the reward tiny-reward is nan for the prompt 'red'"] and bad["said by"] >= 1
    assert answers["replicate, NaN on one rank"]["said by"] < ranks
    encoded = answers["sharded text encoders"]
    assert encoded["equal"] and len(encoded["blocks"]) == 3  # two CLIPs and T5
    for blocks in (*encoded["blocks"].values(), *answers["sharded rewards"]["blocks"].values()):
        assert len(blocks) >= 1 and all(0.9 / ranks < share < 1.2 / ranks for share in blocks)
    assert answers["sharded rewards"]["whole"].keys() == {"pickscore", "imagereward", "hpsv3"}
    assert max(answers["sharded rewards"]["whole"].values()) < 0.99
    check_prompts(answers, ranks)
    exact, rounded = (answers["gathered in bfloat16"][kind] for kind in ("float32", "bfloat16"))
    assert exact["gathered"] == ["torch.float32"] and rounded["gathered"] == ["torch.bfloat16"]
    assert exact["kept"] == rounded["kept"] == ["torch.float32"]
    assert rounded["losses"] != exact["losses"] and rounded["losses"] == pytest.approx(exact["losses"], rel=0.02)
    for way in ("full", "hybrid", "auto", "lora"):
        answer = answers[f"read by rank 0, {way}"]
        assert answer["equal"] and answer["empty"] == [False] + [True] * (ranks - 1), (way, answer)
        assert answer["velocity"] < 1e-5 and answer["sharded"] == (way != "auto"), (way, answer)
    said = answers["another model on rank 0"]["says"]
    assert len(said) == ranks and all("has a different model than rank 0" in words for words in said)
    signalled = answers["a signal to the last rank"]
    assert signalled["status"] == [138] * ranks and signalled["saved"] and signalled["said by"] == 1
    assert answers["saved"]["equal"] and answers["saved"]["share"] < 1.2 / ranks


def check_prompts(answers: dict[str, Any], ranks: int) -> None:
    """Each prompt is encoded and written once where ranks share a cache; else each rank encodes what it needs."""
    for way in ("shared", "apart", "memory", "sharded"):
        answer = answers[f"prompts, {way}"]
        needed, negative = answer["needed"], 1
        assert answer["once"] and answer["later"] == [0] * ranks, (way, answer)
        assert answer["departs"] < 1e-5, (way, answer)
        encoded, written = ([counts[kind] for counts in answer["counts"]] for kind in ("encoded", "written"))
        total = answer["all"] + negative
        if way in ("shared", "sharded"):
            assert sum(written) == total and answer["files"] == [total] * ranks, (way, answer)
            assert max(written) <= -(-total // ranks), (way, answer)
        if way == "sharded":
            assert encoded == [total] * ranks, answer
        else:
            share = written if way == "shared" else [count + negative for count in needed]
            assert encoded == share, (way, answer)
        if way == "apart":
            assert answer["files"] == written == encoded, answer
        if way == "memory":
            assert written == answer["files"] == [0] * ranks, answer
    failed = answers["prompts, a rank that fails"]
    assert failed["says"] == ["the text encoders are gone"] * ranks and failed["calls"] == [2] * ranks


def test_two_ranks_equal_one(two: dict[str, Any]) -> None:
    """Losses, gradients, weights, averages, evaluation rewards: every method, true guidance, all weights and LoRA."""
    check(two, 2)


@pytest.mark.slow
def test_two_ranks_equal_one_in_every_case(tmp_path: Path) -> None:
    answers = launch(2, tmp_path)
    check(answers, 2)
    assert not answers["left to the slow tests"]


def alone(tiny_run: Callable[..., Run], tiny_module: Any, prompts: Path, out: Path, **changes: Any) -> Run:
    """The run of the case `trained`, in one process."""
    run = tiny_run(
        model=tiny_module.TinyModel(double=True), batch_size=8, micro_batch_size=1, evaluation_size=5, **changes
    )
    return replace(run, prompts=replace(run.prompts, path=str(prompts)), out=str(out), steps=4)


def saved_tensors(folder: Path, layout: str) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, by group, whole."""
    assert json.loads((folder / "state.json").read_text())["layout"] == layout
    if layout == "whole":
        return {group: load_file(folder / f"{group}.safetensors") for group in formats.GROUPS}
    groups = {
        g: {n: torch.empty_like(t, device="cpu") for n, t in ts.items()} for g, ts in sharded.listed(folder).items()
    }
    sharded.read(folder, groups)
    return groups


def same_end(first: Path, second: Path, layout: str = "whole") -> None:
    """Checkpoints and metrics of two runs, up to the order of sums; `layout`: of the first."""
    steps = [out / "checkpoints" / "step-000004" for out in (first, second)]
    groups = [saved_tensors(*each) for each in zip(steps, (layout, "whole"))]
    for group in formats.GROUPS:
        ours, theirs = (each[group] for each in groups)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-10)
    one, other = (
        [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(out)] for out in (first, second)
    )
    assert [m["step"] for m in one] == [0, 1, 2, 3, 4]
    for a, b in zip(one, other, strict=True):
        tables = [metrics.pop(BY_STEPS, {}) for metrics in (a, b)]
        assert a == pytest.approx(b, abs=1e-10)
        assert tables[0].keys() == tables[1].keys()
        assert all(column == pytest.approx(tables[1][name], rel=1e-3) for name, column in tables[0].items())


@pytest.mark.parametrize("way", LAYOUT)
def test_one_process_goes_on_with_the_checkpoint_of_two(two, two_folder, tiny_run, tiny_module, tmp_path, way):
    assert two[f"{way}, trained"]["step"] == 2
    prompts = two_folder / "prompts.txt"
    step = two_folder / f"run-{way}" / "checkpoints" / "step-000002"
    saved = saved_tensors(step, LAYOUT[way])["weights"]
    live = {name: torch.zeros_like(value) for name, value in saved.items()}
    formats.read_weights(step, LAYOUT[way], live)
    assert live and all(torch.equal(value, saved[name]) for name, value in live.items())
    shutil.copytree(two_folder / f"run-{way}", tmp_path / "resumed")
    loop.train(alone(tiny_run, tiny_module, prompts, tmp_path / "resumed"), resume=True)
    loop.train(alone(tiny_run, tiny_module, prompts, tmp_path / "whole"))
    same_end(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("way", ["replicate", "full"])
def test_ranks_end_together_and_export_the_best_of_one_process(two, two_folder, tiny_run, tiny_module, tmp_path, way):
    held_out = (HeldOut(reward=tiny_module.Toward(target=0.55)),)
    monitors = Monitors(held_out=held_out, diversity_prompts=3, images_per_prompt=2, image_statistics=True)
    rule = {"evaluate_every": 1, "monitors": monitors, "stop_when": StopWhen(evaluations=3)}
    run = replace(alone(tiny_run, tiny_module, two_folder / "prompts.txt", tmp_path / "one", **rule), steps=40)
    summary = loop.train(run).summary
    found = two[f"{way}, ended by its rule"]
    assert 7 < summary["exported"]["step"] < summary["steps"] < 40 and summary["stopped"]
    assert found.keys() >= {"exported", "stopped"}
    assert found | {"seconds": 0} == {key: summary[key] for key in found} | {"seconds": 0}
    files = [out / "pipeline" / "policy.safetensors" for out in (two_folder / f"run-ended-{way}", tmp_path / "one")]
    ours, theirs = map(load_file, files)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-10)
    kept = list((two_folder / f"run-ended-{way}" / "checkpoints").glob("best-*"))
    assert len(kept) <= 2 and {path.suffix for path in kept[0].iterdir()} == {".safetensors", ".json"}


def damaged(out: Path, kind: str) -> None:
    """The newest sharded checkpoint of two ranks."""
    folder = out / "checkpoints" / "step-000002"
    path = folder / "shard-00002-model-00003-of-00003.safetensors"
    if kind == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
        return
    path.unlink()
    if kind == "unlisted":
        state = json.loads((folder / "state.json").read_text())
        del state["files"][path.name], state["self"]
        (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))


DAMAGE = {
    "flipped": "shard-00002-model-00003-of-00003.safetensors was changed after it was written",
    "missing": "shard-00002-model-00003-of-00003.safetensors is missing or unknown",
    "unlisted": "shard-00002-model-00003-of-00003.safetensors is missing or unknown",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_named_and_the_older_checkpoint_offered(two, two_folder, tiny_run, tmp_path, kind):
    shutil.copytree(two_folder / "run-full", tmp_path / "run")
    damaged(tmp_path / "run", kind)
    with pytest.raises(UserError, match=rf"damaged \({DAMAGE[kind]}.*step-000001 is intact: continue from it"):
        checkpoints.find(tiny_run(out=str(tmp_path / "run")))


def test_parts_need_a_torch_that_reads_them(two_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    with pytest.raises(UserError, match="a sharded checkpoint needs a newer torch than"):
        sharded.listed(two_folder / "run-full" / "checkpoints" / "step-000002")


def test_rank_0_waits_for_parts_but_not_for_ever(tmp_path, monkeypatch):
    writers = sharded.Writers(rank=0, ranks=(0, 2), token="")
    note = tmp_path / "rank-00002.json"
    (tmp_path / "rank-00000.json").write_text('{"files": {"a": "1"}}')
    monkeypatch.setattr(sharded, "PATIENCE", 0.1)
    with pytest.raises(RunStopped, match="rank 2 has written nothing of its part of the checkpoint for 0"):
        sharded.collect(tmp_path, writers)
    monkeypatch.setattr(sharded, "PATIENCE", 60)
    threading.Timer(0.2, note.write_text, ['{"error": "No space left"}']).start()
    (tmp_path / "rank-00000.json").write_text('{"files": {"a": "1"}}')
    with pytest.raises(RunStopped, match="rank 2 could not write its part of the checkpoint: No space left"):
        sharded.collect(tmp_path, writers)
    (tmp_path / "rank-00000.json").write_text('{"files": {"a": "1"}}')
    note.write_text('{"files": {"b": "2"}}')
    assert sharded.collect(tmp_path, writers) == {"a": "1", "b": "2"} and not list(tmp_path.iterdir())
    monkeypatch.setattr(sharded, "PATIENCE_AT_END", 0.1)
    writers.ending.set()
    with pytest.raises(RunStopped, match="rank 0 has written nothing"):
        sharded.collect(tmp_path, writers)


def test_a_rank_that_cannot_write_its_part_says_so_to_rank_0(tmp_path, monkeypatch):
    part = sharded.part_of({"weights": {}}, sharded.Writers(rank=0, ranks=(0, 1), token=""))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded, "_write_files", full)
    with pytest.raises(OSError, match="No space left"):
        sharded.write(tmp_path / "part", {}, part)
    assert json.loads((tmp_path / "part" / "rank-00000.json").read_text()) == {
        "error": "[Errno 28] No space left on device"
    }
    monkeypatch.setattr(sharded, "_write_files", lambda folder, *_: shutil.rmtree(folder) or full())
    with pytest.raises(RunStopped, match="rank 0 has given up the checkpoint"):
        sharded.write(tmp_path / "part", {}, part)


@pytest.mark.slow
def test_four_ranks_equal_one_and_go_on_with_the_checkpoint_of_two(two, two_folder, tiny_run, tiny_module, tmp_path):
    four = tmp_path / "four"
    four.mkdir()
    shutil.copy(two_folder / "prompts.txt", four)
    for way in LAYOUT:
        shutil.copytree(two_folder / f"run-{way}", four / f"run-{way}")
    check(launch(4, four), 4)
    loop.train(alone(tiny_run, tiny_module, four / "prompts.txt", tmp_path / "whole"))
    for way, layout in LAYOUT.items():
        same_end(four / f"run-{way}", tmp_path / "whole", layout)
        files = list((four / f"run-{way}" / "checkpoints" / "step-000004").glob("shard-*"))
        assert len(files) == 3 * {"replicate": 0, "full": 4, "hybrid": 2}[way]  # a copy of a part is written once


FAILURES = {
    "an error": ('raise ValueError("a bug of rank 1")', "a bug of rank 1"),
    "killed": ("os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL)"),  # it says nothing: torchrun's report does
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks, failure", [(2, "an error"), (4, "an error"), (2, "killed"), (4, "killed")])
def test_a_rank_that_fails_ends_the_job_within_a_minute(
    tmp_path: Path, tiny_module: Any, ranks: int, failure: str
) -> None:
    """The command line under torchrun; rank 1's reward fails in the second step, and says why where it can."""
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_module.PROMPTS))
    recipe = tmp_path / "failing.py"
    action, message = FAILURES[failure]
    bug = f"""import os, time
                self.calls.append(1)
                if os.environ["RANK"] == "1" and len(self.calls) > 6:
                    Path("failed").write_text(str(time.time()))
                    {action}
                r = image.mean()"""
    text = Path(tiny_module.__file__).read_text().replace("r = image.mean()", bug, 1)
    text = text.replace('    spoil: str = ""', '    calls: ClassVar[list] = []\n    spoil: str = ""', 1)
    recipe.write_text(text)
    words = ("--device", "cpu", "--steps", "500", "--evaluate-every", "0", "--no-self-checks", "--batch-size", "8")
    done = torchrun(ranks, "-m", "leapalign", "train", f"{recipe}:tiny", *words, folder=tmp_path)
    assert time.time() - float((tmp_path / "failed").read_text()) < 60
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "the exchange with another rank broke off" in done.stderr or "SIGTERM" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_job_killed_in_a_sharded_save_goes_on_from_the_older_checkpoint(tmp_path: Path, tiny_module: Any) -> None:
    """The command line: rank 1 dies with half of its files on the disk; one process resumes."""
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_module.PROMPTS))
    recipe = tmp_path / "killed.py"
    killed = """

import os
from leapalign.checkpoint import sharded

sha256 = sharded.sha256


def killed(path):
    if path.name.startswith("shard-00002") and "step-000002" in path.parent.name:
        path.unlink()
        os.kill(os.getpid(), 9)
    return sha256(path)


sharded.sha256 = killed
"""
    recipe.write_text(Path(tiny_module.__file__).read_text() + killed)
    words = ("--device", "cpu", "--sharding", "full", "--checkpoint-every", "1", "--no-self-checks", "--out", "run")
    begun = time.time()
    done = torchrun(2, "-m", "leapalign", "train", f"{recipe}:tiny", *words, folder=tmp_path)
    assert done.returncode == 1 and "Signal 9 (SIGKILL)" in done.stderr and time.time() - begun < 120, done.stderr
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))] == ["step-000001"]
    again = torchrun(1, "-m", "leapalign", "resume", "run", "--plugin", str(recipe), folder=tmp_path)
    assert again.returncode == 0 and "resuming from step-000001" in again.stderr, again.stderr
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))

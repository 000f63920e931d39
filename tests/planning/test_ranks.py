"""Plans of one of several ranks: against what two ranks hold, what is gathered, and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.methods import ReFL
from leapalign.planning import plan as planning
from leapalign.planning import sharding
from leapalign.planning.plan import make_plan
from leapalign.planning.sharding import Rank, size
from leapalign.recipes import RECIPES
from leapalign.tuning.lora import LoRA
from tiny_recipes import tiny, write_folders

CASE = Path(__file__).with_name("rank_case.py")
SOURCES = str(Path(planning.__file__).parents[2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def run(folders, tmp_path):
    run = tiny(RECIPES["flux-leapalign-pickscore"](), folders, tmp_path / "run")
    return replace(run, samples_per_draw=0, micro_batch_size=1)


def test_the_plan_of_rank_0_is_what_it_holds(tmp_path):
    """Weights, moments, average and rewards, to the byte: replicated, sharded, LoRA, hybrid."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(CASE), str(tmp_path)]
    path = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    for way, parts in answers.items():
        for part, (planned, held) in parts.items():
            assert planned == held > 0, (way, part)
    weights = {way: parts["transformer"][0] for way, parts in answers.items()}
    assert weights["full"] < 0.6 * weights["replicate"] == 0.6 * weights["hybrid"]
    assert answers["full"]["rewards"][0] < 0.9 * answers["replicate"]["rewards"][0]


def test_what_is_gathered_is_the_rest_and_blocks():
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Linear(10, 30, bias=False), nn.Linear(10, 20, bias=False)])
    net.last = nn.Linear(5, 5, bias=False)
    rank = Rank(world=World(size=4), among=4, sharded=True)
    assert rank.policy(net, trained=False) == 4 * (8 * 10 + 5 * 10 + 2 * 5)  # of 30, 20 and 5 rows
    assert rank.largest(net) == 4 * 80
    assert rank.gathered(net) == (4 * (25 + 3 * 300), 4 * (2 * 25 + 5 * 300))
    net.blocks.requires_grad_(False)  # as under LoRA: the trained rest stays whole, and no gradient is shared out
    assert rank.policy(net, trained=False) == 4 * (8 * 10 + 5 * 10 + 25)
    assert rank.policy(net, trained=True) == rank.largest(net) == 4 * 25
    assert rank.gathered(net) == (4 * 900, 4 * 900)
    rounded = replace(rank, rounded=True)  # float32 weights arrive as bfloat16; gradients are summed in float32
    assert rounded.gathered(net) == (2 * 900, 2 * 900) and rounded.received(net, 10, 0) == 0.75 * 10 * 2 * 500
    net.requires_grad_(True)
    assert rounded.gathered(net) == (2 * (25 + 3 * 300), 2 * (2 * 25 + 4 * 300) + 4 * 300)
    assert rank.received(net, 3, 2) == 0.75 * (3 + 2) * 4 * 525 and rounded.received(net, 3, 2) == int(
        0.75 * (6 + 8) * 525
    )
    assert Rank().gathered(net) == (0, 0) and Rank().policy(net, trained=False) == 4 * (300 + 200 + 25)
    assert size(torch.zeros(2, 3), 4) == 12 and size(torch.zeros(()), 4) == 4


def test_phases_and_geometry_of_a_rank(run, monkeypatch):
    monkeypatch.setattr(sharding, "GATHERED", 1)  # three blocks would be more than this model has
    alone, two = make_plan(run), make_plan(replace(run, sharding="full"), ranks=2)
    assert two.geometry["accumulations"] == alone.geometry["accumulations"] // 2 == 2
    assert two.geometry["ranks"] == two.geometry["ranks_that_share_the_weights"] == 2
    assert "ranks" not in alone.geometry
    gathering = make_plan(replace(run, sharding="full", gather_in_rollout=True), ranks=2)
    assert gathering.phases["rollout"] > two.phases["rollout"]
    assert gathering.phases["backward"] == two.phases["backward"]
    text = make_plan(replace(run, sharding="full", shard_text_encoders=True), ranks=2).phases["encoding prompts"]
    assert text < two.phases["encoding prompts"] < alone.phases["encoding prompts"]
    assert any("in 14 gathers of the weights" in note for note in two.notes), two.notes
    assert any(note.startswith("rank 0 reads the transformer whole: 0.0 GB") for note in two.notes)


def test_auto_is_decided_as_in_training(run, monkeypatch):
    def shared(changed, memory: int) -> tuple[int, tuple[str, ...]]:
        monkeypatch.setattr(planning, "_capacity", lambda device: memory)
        plan = make_plan(replace(changed, device="cuda"), ranks=2)
        return plan.geometry["ranks_that_share_the_weights"], plan.notes

    assert shared(run, 10**12)[0] == 1 and shared(run, 10**6)[0] == 2
    lanes, notes = shared(run, 0)
    assert lanes == 1 and any("as on GPUs of 80 GB" in note for note in notes)
    lanes, notes = shared(replace(run, samples_per_draw=1), 10**6)
    assert lanes == 2 and any(note.startswith("sharding auto: full, because") for note in notes)
    lanes, notes = shared(replace(run, samples_per_draw=1, method=ReFL()), 10**6)
    assert lanes == 1 and any("samples_per_draw 1 is not a multiple of the 2 samples" in note for note in notes)
    lanes, _ = shared(replace(run, tuning=LoRA(rank=2, quantization="int8"), dtype="bfloat16"), 10**6)
    assert lanes == 1


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({}, 3, "batch_size 4 cannot be divided into rounds of 3 ranks"),
        ({}, 0, "ranks 0, ranks_per_machine 8: both must be at least 1"),
        (
            {"sharding": "full", "samples_per_draw": 1, "method": ReFL()},
            2,
            "samples_per_draw 1 is not a multiple of the 2 samples",
        ),
        ({"sharding": "hybrid", "shard_ranks": 3}, 4, "shard_ranks 3 does not divide 4 ranks"),
        ({"shard_rewards": ("hpsv3",)}, 2, "unknown reward 'hpsv3'"),
        ({"sharding": "full", "tuning": LoRA(rank=2, quantization="int8"), "dtype": "bfloat16"}, 2, "quantised base"),
    ],
)
def test_what_does_not_fit_the_ranks(run, changes, number, message):
    with pytest.raises(UserError, match=message):
        make_plan(replace(run, **changes), number)


def test_by_the_command(run, tmp_path, capsys):
    (tmp_path / "run.json").write_text(dumps(replace(run, sharding="full")))
    words = ["train", str(tmp_path / "run.json"), "--ranks", "4"]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["ranks"] == 4
    assert main([*words, "--dry-run"]) == 0
    assert "ranks that share the weights" in capsys.readouterr().out
    assert main(words) == 2
    assert "torchrun --nproc-per-node 4 -m leapalign train" in capsys.readouterr().err
    assert not Path(run.out).exists()

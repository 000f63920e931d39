"""Out of memory, simulated: the run stops with the parts in memory and three settings that it can still change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from leapalign.checkpoint import checkpoints
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.distributed.world import World
from leapalign.errors import RunStopped, UserError
from leapalign.methods import ReFL
from leapalign.models.sd3 import SD3
from leapalign.run import RewardTerm
from leapalign.training import loop, out_of_memory
from leapalign.training.out_of_memory import Setup

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)
LOADING = Setup(world=World(), loading=True)
BLOCKS = Setup(world=World(), blocks=True)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), MemoryError(), CPU]


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """A reward that needs too much from its `calls`-th call on."""

    name: ClassVar[str] = "greedy"

    error: int  # its number in ERRORS
    calls: int = 0

    def load(self, *_):
        left = [self.calls]

        def reward(images, prompts):
            left[0] -= 1
            if left[0] < 0:
                raise ERRORS[self.error]
            return images.mean((1, 2, 3))

        return reward


@pytest.mark.parametrize("error", range(len(ERRORS)), ids=lambda i: type(ERRORS[i]).__name__)
def test_a_step_that_needs_too_much_stops_the_run_with_advice(tiny_run, error):
    greedy = RewardTerm(reward=Greedy(error=error, calls=5), threshold=2.0)
    run = tiny_run(rewards=(greedy,), evaluate_every=0, checkpoint_every=1)
    with pytest.raises(RunStopped) as stopped:
        loop.train(run)
    said = str(stopped.value)
    assert said.startswith("step 3: out of memory (") and "more" not in said.splitlines()[0]
    assert "GiB  optimiser (two moments)" in said and "GiB  their average" in said
    assert "1. --graph inputs" in said and "2. --micro-batch-size 1" in said and "3. --reward-chunk 1" in said
    assert "4." not in said and "--allow-changes" in said
    assert checkpoints.find(run).folder.name == "step-000002"  # what had been saved is whole


def test_the_command_line_exits_with_1_and_no_traceback(tiny_run, tmp_path, recipe_file, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "update", fail)
    (tmp_path / "given.json").write_text(dumps(tiny_run()))
    assert main(["train", str(tmp_path / "given.json"), "--plugin", str(recipe_file)]) == 1
    said = capsys.readouterr().err
    assert "leapalign: stopped at step 1: out of memory (MemoryError)" in said and "Traceback" not in said


def test_loading_that_needs_too_much_advises_on_what_is_loaded(tiny_run, monkeypatch):
    """Also where the folder's own error hides it."""

    def load(*_):
        try:
            raise CPU
        except RuntimeError as error:
            raise UserError("x/transformer cannot be opened") from error

    run = tiny_run()
    monkeypatch.setattr(type(run.model), "load", load)
    with pytest.raises(RunStopped, match=r"loading: out of memory \(\[enforce fail"):
        loop.train(run)
    assert "1. a recipe that trains a LoRA" in out_of_memory.message(run, "loading", CPU, LOADING)


def flags(run, setup=BLOCKS) -> list[str]:
    return [text.split(":")[0] for text in out_of_memory.settings(run, setup)]


def test_several_ranks_are_told_of_sharding_first(tiny_run):
    """And of the draws that sharded ranks must share, where the run's own do not fit."""
    ranks = replace(BLOCKS, world=World(rank=1, size=4, local_size=4))
    run = tiny_run(batch_size=16, micro_batch_size=2)
    assert flags(run, ranks)[0] == flags(run, replace(ranks, loading=True))[0] == "--sharding full"
    assert "each of the 4 ranks keeps 1/4 of weights" in out_of_memory.settings(run, ranks)[0]
    own = replace(run, samples_per_draw=2)
    assert flags(own, ranks)[0] == "--sharding full"
    assert flags(replace(own, method=ReFL()), ranks)[0] == "--sharding full --samples-per-draw 8"
    sharded = replace(ranks, sharded=True)
    assert not any("sharding" in flag or "gather" in flag for flag in flags(run, sharded))
    assert flags(replace(run, gather_in_rollout=True), sharded)[0] == "--no-gather-in-rollout"


def test_advice_is_what_the_run_can_still_change(tiny_run):
    run = tiny_run(micro_batch_size=4, model=SD3(path="x", decode_chunk=0))
    graph = ["--graph blocks", "--micro-batch-size 2", "--reward-chunk 1", "--model.decode-chunk 1", "--dtype bfloat16"]
    assert flags(run)[:5] == graph
    assert flags(run, replace(BLOCKS, blocks=False))[0] == "--graph inputs"
    assert flags(replace(run, graph="blocks"))[0] == "--graph inputs"
    small = replace(run, graph="inputs", micro_batch_size=1, dtype="bfloat16", model=SD3(path="x", decode_chunk=1))
    assert flags(small)[0].startswith("a recipe that trains a LoRA")
    assert not set(flags(small)) & set(graph) and len(flags(small)) >= 3


def test_other_errors_go_their_way(tiny_run):
    for error in (RuntimeError("shapes"), UserError("a folder"), ValueError("x")):
        with pytest.raises(type(error)), out_of_memory.explained(tiny_run(), "step 1", BLOCKS):
            raise error

"""What is asked of ranks and of their settings before they train; no second rank is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_families
import tiny_pipelines
from leapalign.distributed import fsdp_frozen, prompts
from leapalign.distributed.choice import check_fits, choose
from leapalign.distributed.fsdp import shard
from leapalign.distributed.process_group import VARIABLES, joined, world_device
from leapalign.distributed.rank_rules import check_geometry, unequal_forwards
from leapalign.distributed.world import World, fingerprint
from leapalign.errors import UserError
from leapalign.methods import (
    RSM,
    AlignProp,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
)
from leapalign.models.z_image import ZImage
from leapalign.prompts import Prompt
from leapalign.rewards.adapt import complete
from leapalign.run import FREE_FIELDS, Run
from leapalign.storage.pipeline_folder import Loading
from leapalign.training import batches, loop


def test_a_batch_that_does_not_fit_names_the_nearest_that_do(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(batch_size=12, micro_batch_size=2)
    for ranks in (1, 2, 3, 6):
        check_geometry(run, World(size=ranks))
    with pytest.raises(UserError, match=r"batch_size 8 or 16, or micro_batch_size 1 or 3, or 3 or 6 ranks"):
        check_geometry(run, World(size=4))
    with pytest.raises(UserError, match=r"use batch_size 10 or 20, or 3 or 6 ranks"):
        check_geometry(run, World(size=5))


def test_sharded_ranks_need_one_draw_at_a_time_where_forwards_depend_on_it(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(batch_size=24, micro_batch_size=2, samples_per_draw=6, sharding="full", method=ReFL())
    with pytest.raises(UserError, match="use samples_per_draw 4 or 8, 0 for the whole batch, or sharding replicate"):
        check_geometry(run, World(size=2))
    check_geometry(replace(run, sharding="replicate"), World(size=2))
    check_geometry(run, World(size=3))
    assert not unequal_forwards(run, World(size=3)) and unequal_forwards(run, World(size=2))
    with pytest.raises(UserError, match="shard_ranks 3 does not divide 4 ranks; use 2 or 4"):
        check_geometry(replace(run, samples_per_draw=0, sharding="hybrid", shard_ranks=3), World(size=4))


def test_draws_of_their_own_are_refused_only_where_ranks_would_gather_differently(tiny_run, tmp_path):
    """LeapAlign and DRaFT make the same forwards for every draw; other causes than the method count as well."""
    two = World(size=2)
    fitting = {LeapAlign(): True, DRaFT(): True, DRaFTLV(): True, DRTune(): False, AlignProp(): False}
    fitting |= {FlowBPSparse(): True, FlowBPBridge(): True, FlowBPLagrange(): False, RSM(): True}
    for method, fits in fitting.items():
        run = tiny_run(batch_size=4, micro_batch_size=1, samples_per_draw=1, method=method, sharding="full")
        assert bool(unequal_forwards(run, two)) is not fits
    run = replace(run, method=LeapAlign())
    check_geometry(run, two)
    with pytest.raises(UserError, match="gather_in_rollout gathers by the draw, and samples_per_draw 1"):
        check_geometry(replace(run, gather_in_rollout=True), two)
    model = ZImage(path="z", cfg_truncation=0.5)
    with pytest.raises(UserError, match="the forwards of z-image depend on the step"):
        check_geometry(replace(run, model=model), two)
    check_geometry(replace(run, model=ZImage(path="z")), two)


def test_rounded_gathers_need_bfloat16_arithmetic(tiny_run: Callable[..., Run]) -> None:
    assert "gather_dtype" not in FREE_FIELDS  # it changes numbers
    tiny_run(gather_dtype="bfloat16", dtype="bfloat16")
    with pytest.raises(UserError, match="gather_dtype bfloat16 with dtype float32"):
        tiny_run(gather_dtype="bfloat16")


def test_nothing_is_loaded_before_the_geometry_is_checked(tiny_run, monkeypatch):
    for name, value in zip(VARIABLES, ("0", "3", "0", "3", "localhost", "1")):
        monkeypatch.setenv(name, value)
    run = tiny_run(batch_size=4, micro_batch_size=2, model=ZImage(path="no-such-folder"))
    with pytest.raises(UserError, match="rounds of 3 ranks"):
        loop.train(run)
    assert not Path(run.out).exists()


def test_ranks_share_out_the_batch_and_change_no_sample(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(batch_size=12, micro_batch_size=2)
    texts = run.prompts.load()
    one = list(batches.micro_batches(run, texts, 5))
    three = [list(batches.micro_batches(run, texts, 5, rank, 3)) for rank in range(3)]
    assert [micro for micros in zip(*three) for micro in micros] == one
    assert [micro.samples.start for micro in three[1]] == [2, 8]


def test_a_rank_encodes_the_prompts_of_its_samples_and_those_that_all_score(tiny_run: Callable[..., Run]) -> None:
    """Of more prompts than the run reaches; beside its own: the evaluation's, and the first sample's (self-checks)."""
    run = tiny_run(batch_size=12, micro_batch_size=2, steps=3, evaluation_size=2)
    texts = [Prompt(text=str(number)) for number in range(100)]
    evaluation = {prompt.text for prompt in batches.evaluation_set(run, texts)}
    first = next(batches.micro_batches(run, texts, 0)).prompts[0]
    for rank in range(3):
        micros = [micro for step in range(3) for micro in batches.micro_batches(run, texts, step, rank, 3)]
        own = {prompt for micro in micros for prompt in micro.prompts}
        assert len(own) == 12 and set(batches.prompts_used(run, texts, rank=rank, ranks=3)) == own | evaluation | {
            first
        }
    assert len(batches.prompts_used(replace(run, evaluation_size=1), texts)) <= 37
    assert sorted(batches.prompts_used(replace(run, steps=10**9), texts, rank=2, ranks=3)) == sorted(
        map(str, range(100))
    )


@pytest.mark.parametrize(
    "change, words",
    [({"LOCAL_RANK": ""}, "expected whole numbers"), ({"RANK": "2"}, "expected ranks below their sizes")],
)
def test_a_strange_environment_is_a_sentence(tiny_run, monkeypatch, change, words):
    for name, value in (dict(zip(VARIABLES, ("0", "2", "0", "2", "localhost", "1"))) | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), joined(tiny_run()):
        pass
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="MASTER_PORT is not set; start the ranks with `torchrun"), joined(tiny_run()):
        pass


def test_ranks_have_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_device("cuda:1", World()) == "cuda:1" and world_device("cpu", World(size=2)) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = World(rank=5, size=8, local_rank=1, local_size=4)
    assert world_device("auto", second) == world_device("cuda", second) == "cuda:1"
    with pytest.raises(UserError, match="device 'cuda:0' would be shared by all 8 ranks"):
        world_device("cuda:0", second)
    with pytest.raises(UserError, match="rank 6 is number 2 on its machine, which has 2 CUDA devices"):
        world_device("cuda", replace(second, rank=6, local_rank=2))


def test_what_cannot_be_sharded_is_refused(tiny_run: Callable[..., Run]) -> None:
    run, two_ranks = tiny_run(sharding="full"), World(size=2, local_size=2)
    policy = torch.nn.Linear(2, 2)
    assert shard(replace(run, sharding="auto"), policy, two_ranks, "cpu") is None  # small, and on the CPU
    policy.hf_quantizer = object()  # pyright: ignore
    with pytest.raises(UserError, match="a quantised base cannot be sharded"):
        shard(run, policy, two_ranks, "cpu")


def test_frozen_networks_that_cannot_be_sharded_are_refused(tiny_run: Callable[..., Run], tiny_module: Any) -> None:
    """Unknown names and devices before anything is loaded; the rest before anything is sharded."""
    two_ranks, name = World(size=2, local_size=2), "tiny-reward"
    with pytest.raises(UserError, match="unknown reward 'hpsv3'; the run has tiny-reward"):
        loop.build(tiny_run(model=ZImage(path="no-such-folder"), shard_rewards=("hpsv3",)))
    run = tiny_run(shard_rewards=(name,), shard_text_encoders=True)
    elsewhere = (replace(run.rewards[0], device="cpu"),)
    with pytest.raises(UserError, match=r"tiny-reward has its own device \(cpu\)"):
        loop.build(replace(run, model=ZImage(path="no-such-folder"), rewards=elsewhere))
    with pytest.raises(UserError, match="tiny-reward has no network"):
        fsdp_frozen.shard_rewards(run, {name: complete(name, lambda images, prompts: images.mean())}, two_ranks, "cpu")
    plain: Any = SimpleNamespace(network=lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match="tiny-reward has no repeated blocks"):
        fsdp_frozen.shard_rewards(run, {name: plain}, two_ranks, "cpu")
    layer = torch.nn.Linear(2, 2)
    tied = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer, torch.nn.Sequential(layer)])})
    reward_of_tied: Any = SimpleNamespace(network=lambda: tied)
    with pytest.raises(UserError, match="blocks that share weights"):
        fsdp_frozen.shard_rewards(run, {name: reward_of_tied}, two_ranks, "cpu")
    with pytest.raises(UserError, match="TinyModel encodes its prompts itself"):
        prompts.prepare(run, run.model.load("cpu", "float32"), [["red"], ["red"]], two_ranks, "cpu")


def gpu_of(monkeypatch: pytest.MonkeyPatch, memory: int) -> str:
    """The name of a CUDA device with this many bytes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    return "cuda:0"


def test_auto_shards_a_large_policy_on_cuda_and_says_why(tiny_run, monkeypatch):
    """20 bytes a trained weight against 40 % of a device's memory, where the draws allow it."""
    policy, two = torch.nn.Linear(999, 1000), World(size=2)  # 10 ** 6 weights
    run = tiny_run(batch_size=8, micro_batch_size=2)
    small = choose(run, policy, two, gpu_of(monkeypatch, 51_000_000))
    assert not small.sharded and small.why == (
        "sharding auto: replicate, because weights, gradients, optimiser and average take 0.02 GB of 0.051 GB of memory"
    )
    large = choose(run, policy, two, gpu_of(monkeypatch, 49_000_000))
    assert large.sharded and large.why.startswith("sharding auto: full, because replicated weights")
    own = replace(run, samples_per_draw=2)
    assert choose(own, policy, two, "cuda:0").sharded  # LeapAlign's forwards do not depend on the draw
    refl = choose(replace(own, method=ReFL()), policy, two, "cuda:0")
    assert not refl.sharded and "replicate, because the forwards of refl depend on the draw" in refl.why
    assert choose(run, policy, two, "cpu").why == "sharding auto: replicate, because the ranks compute on CPUs"
    assert choose(run, policy, World(), "cuda:0") == choose(replace(run, sharding="replicate"), policy, two, "cuda:0")


def test_what_cannot_fit_is_refused_before_prompts_are_encoded(tiny_run, monkeypatch):
    """20 MB of a policy whose weights are trained, on devices of 6 MB."""
    policy, device = torch.nn.Linear(999, 1000), gpu_of(monkeypatch, 6_000_000)
    run = tiny_run(batch_size=24, micro_batch_size=2, samples_per_draw=2)
    for world, ways in ((World(), "use 4 ranks or more with --sharding full, or"), (World(size=4), "")):
        with pytest.raises(UserError, match=f"cuda:0 has 0.006 GB of memory; weights.*{ways}"):
            check_fits(replace(run, sharding="replicate"), policy, world, device)
    with pytest.raises(UserError, match=r"0\.02 GB on each rank; use --sharding full, or a recipe that trains a LoRA"):
        check_fits(replace(run, sharding="replicate"), policy, World(size=4), device)
    with pytest.raises(UserError, match=r"use --sharding full \(the forwards of refl depend on the draw"):
        check_fits(replace(run, method=ReFL()), policy, World(size=4), device)
    hybrid = replace(run, sharding="hybrid", shard_ranks=2)
    with pytest.raises(UserError, match=r"0\.01 GB on each rank; use --sharding full, or --shard-ranks 4 or more"):
        check_fits(hybrid, policy, World(size=4), device)
    check_fits(run, policy, World(size=4), device)
    check_fits(replace(run, sharding="replicate"), policy, World(), "cpu")
    policy.bias.requires_grad_(False)
    with pytest.raises(UserError, match="on each rank; use a recipe that trains a LoRA, or a smaller model"):
        check_fits(run, policy, World(size=4), device)  # trained weights beside frozen ones are not sharded


@pytest.mark.parametrize("family", lora_families.FAMILIES)
def test_a_policy_without_values_lacks_its_weights_and_nothing_else(tmp_path: Path, family: str) -> None:
    """Whatever else a family's class computes when it is made (rotations, tables) is there: filled, it is the model."""
    built = lora_families.FAMILIES[family]
    tiny_pipelines.save(built.build(), tmp_path)
    config = built.config(str(tmp_path))
    alone = config.load("cpu", "float32")
    model = config.load("cpu", "float32", loading=Loading(policy="meta"))
    assert all(p.is_meta for p in model.policy.parameters())
    buffers = dict(alone.policy.named_buffers())
    for name, buffer in model.policy.named_buffers():
        buffer.copy_(buffers[name])
    model.policy.load_state_dict(alone.policy.state_dict(), assign=True)
    text, noise = alone.encode(["a red circle"]), alone.noise([torch.Generator().manual_seed(1)])
    with torch.no_grad():
        ours, theirs = (m.velocity(text)(noise, torch.tensor(0.5)) for m in (model, alone))
    assert torch.equal(ours, theirs)


def test_a_single_changed_bit_changes_the_fingerprint() -> None:
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.randn(2, dtype=torch.float64)}
    before = fingerprint(tensors)
    assert fingerprint({name: t.clone() for name, t in tensors.items()}) == before
    tensors["a"].view(torch.int32)[3, 2] ^= 1
    assert fingerprint(tensors) != before

"""Memory claims that are exact counts and no timings: LeapAlign is flat in T, and with only inputs kept n leaps peak
like ReFL. With the bench's own functions, on tiny random models of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_pipelines
from leapalign.lookup.recipes import load_file
from leapalign.methods.leapalign import LeapAlign
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from tiny_clip import write_tiny_clip

BENCHES = Path(__file__).parents[2] / "benches"
MB = 2**20


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_file(str(BENCHES / "memory.py"))


@pytest.fixture(scope="module")
def table(bench, tmp_path_factory) -> dict:
    """graph -> method -> T -> bytes."""
    folder = tmp_path_factory.mktemp("memory")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(), folder / "sd3")
    write_tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    run = Run(
        name="memory",
        model=SD3(path=str(folder / "sd3"), height=16, width=16, guidance_scale=3.0, max_sequence_length=8),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=PickScore(path=str(folder / "clip")), threshold=2.0),),
        prompts=PromptFile(path=str(folder / "prompts.txt")),
        out="unused",
        steps=1,
        batch_size=2,
        micro_batch_size=2,
        evaluation_size=1,
        device="cpu",
    )
    return bench.measure(run, steps=(4, 8), leaps=(2, 3), full=True)


def test_leapalign_is_flat_in_the_number_of_steps_and_the_whole_chain_is_not(bench, table):
    flat = bench.ratios(table)["largest_T_over_smallest"]
    assert {name: ratio for name, ratio in flat.items() if "/leapalign" in name and ratio > bench.FLAT} == {}
    assert flat["all/full"] > 1.8  # twice the steps


def test_with_only_inputs_kept_n_leaps_peak_like_refl(bench, table):
    found = bench.ratios(table)["inputs_over_refl"]
    assert set(found) == {"leapalign-2", "leapalign-3"}
    assert max(row[key] for row in found.values() for key in ("peak", "backward")) <= bench.LIKE_REFL
    assert table["all"]["leapalign-3"][8]["peak"] > 2 * table["all"]["refl"][8]["peak"]  # so the bound can fail
    assert bench.reached(bench.ratios(table)) == {"flat_in_T": True, "inputs_peak_like_refl": True}


def test_each_graph_setting_saves_less_than_the_one_before(table):
    for method in ("refl", "leapalign-2", "leapalign-3", "full"):
        everything, blocks, inputs = (table[graph][method][8]["saved"] for graph in ("all", "blocks", "inputs"))
        assert everything > 2 * blocks > 4 * inputs > 0


def test_inputs_need_no_more_than_blocks_in_any_phase(table):
    """A recomputed forward keeps its blocks' inputs, of one leap at a time."""
    for method in ("leapalign-2", "leapalign-3"):
        blocks, inputs = (table[graph][method][8] for graph in ("blocks", "inputs"))
        assert inputs["peak_of"]["backward"] <= blocks["peak_of"]["backward"]
        assert inputs["peak"] <= blocks["peak"] and inputs["first"] <= blocks["first"]


def test_live_bytes_of_a_chain_counted_by_hand(bench):
    with bench.LiveBytes() as live:
        live.begin("first")
        x = torch.ones(MB // 4)  # 1 MB lives
        y = x.view(2, -1).mul_(2)  # a view and a change in place: nothing new
        z = torch.cat([y, y])  # 3 MB live
        live.begin("second")
        del x, y  # 2 MB live
        a = z * 2  # 4
        b = a * 2  # 6, the most
        del a  # 4
        live.begin("third")
        c = b[:1] * 2  # 4 + 0.5 (one row of 4)
    assert live.peaks() == {"first": 3 * MB, "second": 6 * MB, "third": 4 * MB + c.nbytes}
    assert live.peaks(without=[b]) == {"first": 3 * MB, "second": 4 * MB, "third": 2 * MB + c.nbytes}
    assert c.nbytes == MB // 2 and z.nbytes == 2 * MB


def test_live_bytes_through_a_backward_agree_with_the_allocator(bench):
    x = torch.randn(300, 100, requires_grad=True)
    w = torch.randn(100, 200, requires_grad=True)

    def backward() -> None:
        torch.utils.checkpoint.checkpoint(lambda: (x @ w).exp().sin(), use_reentrant=False).sum().backward()

    with bench.LiveBytes() as live:
        live.begin("all")
        backward()
    counted, most = live.peaks()["all"], allocator_peak(lambda: (clear(x, w), backward()))
    assert most == pytest.approx(counted, rel=0.01)
    assert counted > 3 * 300 * 200 * 4  # exp and its gradient are there together


def test_gradients_that_were_there_are_not_counted_and_sums_beside_them_are(bench):
    w = torch.nn.Parameter(torch.randn(300, 300))
    w.grad = torch.zeros_like(w)
    x = torch.randn(2, 300)

    def most(uses: int) -> int:
        with bench.LiveBytes() as live:
            live.begin("forward")
            y = x
            for _ in range(uses):
                y = y @ w
            live.begin("backward")
            y.sum().backward()
        return live.peaks()["backward"]

    assert most(1) < 1.2 * w.nbytes  # one weight's gradient on its way to .grad
    assert most(3) > 1.9 * w.nbytes


def clear(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


def allocator_peak(action) -> int:
    """From torch's own record of every allocation on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    records = profile.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


def test_saved_bytes_count_each_storage_once_and_no_parameter(bench):
    w = torch.nn.Parameter(torch.randn(100, 100))
    x = torch.randn(50, 100)
    saved = bench.Saved([w])
    with saved.hooks:
        y = (x @ w).exp()  # saves x, w (a parameter) and the result
        z = y * y.t().t()  # saves y twice, once as a view
        gone = (w * 2).sin()
    del gone  # its graph holds nothing any more
    assert saved.bytes() == x.nbytes + y.nbytes
    z.sum().backward()
    assert saved.bytes() == 0


def test_cases_have_their_leaps_spread_over_the_whole_rollout(bench):
    found = {name: draws for name, (_, draws) in bench.cases(10, (1, 2, 3), True).items()}
    assert found["leapalign-1"].steps == (10,) and found["leapalign-2"].steps == (10, 5)
    assert found["leapalign-3"].steps == (10, 6, 3) and found["refl"].t_min == 4 and "full" in found


def test_ratios_look_at_the_worst(bench):
    def row(peak: int, backward: int) -> dict:
        return {"peak": peak, "peak_of": {"backward": backward}, "first": 2 * peak}

    rows = {"refl": {10: row(100, 80), 50: row(100, 80)}, "leapalign-2": {10: row(100, 80), 50: row(120, 80)}}
    found = bench.ratios({"inputs": rows})
    assert found["largest_T_over_smallest"]["inputs/leapalign-2"] == 1.2
    assert found["inputs_over_refl"]["leapalign-2"] == {"peak": 1.2, "backward": 1.0, "first": 1.2}
    assert bench.reached(found) == {"flat_in_T": False, "inputs_peak_like_refl": False}

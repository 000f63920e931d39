"""Plans of policy-gradient runs: forwards, kept states, scoring without gradient, and what cannot start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leapalign.errors import UserError
from leapalign.methods import DanceGRPO, FlowGRPO, MixGRPO
from leapalign.planning.forwards import count_forwards
from leapalign.planning.plan import make_plan
from leapalign.recipes import RECIPES
from leapalign.training import loop, policy_gradient
from tiny_recipes import tiny, write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def run(folders, tmp_path):
    base = tiny(RECIPES["flux-leapalign-pickscore"](), folders, tmp_path / "run")
    return replace(base, method=FlowGRPO(kl_weight=0.0), samples_per_prompt=2, batch_size=4, micro_batch_size=2)


@pytest.mark.parametrize(
    ("method", "forwards", "with_graph"),
    [
        (FlowGRPO(kl_weight=0.0), 5 + 5, 5),
        (FlowGRPO(kl_weight=0.1), 5 + 5 + 5, 5),
        (FlowGRPO(kl_weight=0.0, window=2, timestep_range=(0.0, 1.0)), 5 + 2, 2),
        (DanceGRPO(), 5 + 2, 2),  # int(0.6 * 4)
        (MixGRPO(window=2, tail_share=0.5), 2 + 2 + 2, 2),
    ],
    ids=["all", "divergence", "window", "dance", "flash"],
)
def test_forwards_are_counted(run, method, forwards, with_graph):
    run = replace(run, method=method, num_sampling_steps=5)
    found = count_forwards(run)
    assert (found.mean, found.most_with_graph, found.copies) == (forwards, with_graph, 1)


def test_the_geometry_is_that_of_an_update(run):
    run = replace(run, num_sampling_steps=5, updates_per_rollout=2, steps=4, checkpoint_every=2)
    geometry = make_plan(run).geometry
    assert (geometry["forwards"], geometry["forwards_with_graph_at_most"], geometry["images_scored"]) == (10, 5, 2)
    assert geometry["samples_per_prompt"] == 2


def test_the_kept_states_are_those_of_the_loaded_run(run):
    plan = make_plan(run)
    engine = loop.build(replace(run, updates_per_rollout=1))
    policy_gradient.roll_out_batch(engine, 0)
    tensors = {id(t): t for r in engine.rolled_out for kept in r.steps for t in kept if hasattr(t, "untyped_storage")}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert 2 * plan.graphs[run.graph].kept == pytest.approx(size, rel=0.02)  # two micro-batches
    whole = make_plan(replace(run, batch_size=8)).phases  # four
    assert whole["rollout"] - plan.phases["rollout"] == pytest.approx(size, rel=0.02)
    held = make_plan(replace(run, method=FlowGRPO(kl_weight=0.1)))
    assert "base of anchor and drift" in held.memory.keys() - plan.memory.keys()


def test_what_cannot_start_is_found_by_the_plan(run):
    with pytest.raises(UserError, match="compares samples of one prompt"):
        make_plan(replace(run, samples_per_prompt=1))

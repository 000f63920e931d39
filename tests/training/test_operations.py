"""Operations of an update by torch's counter, against forwards and backwards counted by hand."""

from __future__ import annotations

from leapalign.methods.draft import DRaFT
from leapalign.methods.flow_grpo import FlowGRPO
from leapalign.studies.arena.cost import measure

ROW = 2 * 50 * 16 + 2 * 16 * 48  # of the tiny model's two matrix products, a sample


def test_operations_are_those_counted_by_hand(tiny_run) -> None:
    """DRaFT-1: five forwards, one with a backward of weights and input, which flow/graph.py asks for at every state."""
    found = measure(tiny_run(method=DRaFT()), updates=2)
    assert found.forwards == 5
    assert found.generator_forward == 4 * 5 * ROW
    assert found.generator_backward == 4 * 2 * ROW
    assert found.scoring == 0 and found.updates == 2
    assert found.backwards == 1


def test_policy_gradients_are_counted_over_whole_rollouts(tiny_run) -> None:
    """Two steps are rolled out for every two updates; each is trained in halves, with a base's forward for the KL."""
    method = FlowGRPO(clip_range=1e-3, kl_weight=0.1)
    run = tiny_run(method=method, samples_per_prompt=2, updates_per_rollout=2, num_sampling_steps=2)
    found = measure(run, updates=1)
    assert found.updates == 2
    assert found.forwards == (2 + 2 * 2) / 2  # of a rollout's sample over two updates: 2, and 2 of each step trained

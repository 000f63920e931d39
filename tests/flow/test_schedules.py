"""Rollouts that change the velocity between steps."""

from __future__ import annotations

import pytest
import torch

from leapalign.errors import UserError
from leapalign.flow.grids import sigma_grid
from leapalign.flow.rollout import rollout
from leapalign.flow.schedules import scheduled_rollouts, within
from small_problem import DIM, Net

T = 4


def problem() -> tuple[list[Net], torch.Tensor, torch.Tensor]:
    return [Net(seed=0), Net(seed=1)], torch.randn(3, DIM, dtype=torch.float64), sigma_grid(T, 2.0, torch.float64)


def test_one_velocity_is_the_rollout_and_a_swap_is_two_rollouts_bit_for_bit():
    nets, noise, sigmas = problem()
    swaps = [within(1, t, T) for t in range(T, -1, -1)]
    ends = scheduled_rollouts(nets, swaps, noise, sigmas)
    assert torch.equal(ends[0], rollout(nets[1], noise, sigmas))
    assert torch.equal(ends[-1], rollout(nets[0], noise, sigmas))
    for t, end in zip((3, 2, 1), ends[1:]):
        x_t = rollout(nets[0], noise, sigmas, stop=t)
        assert torch.equal(end, rollout(nets[1], x_t, sigmas[: t + 1]))
    assert not any(end.requires_grad for end in ends)


def test_a_range_in_the_middle_and_steps_that_are_shared_run_once():
    nets, noise, sigmas = problem()
    (end,) = scheduled_rollouts(nets, [within(2, 3, T)], noise, sigmas)
    x = rollout(nets[0], noise, sigmas, stop=3)
    for t, net in ((3, nets[1]), (2, nets[1]), (1, nets[0])):
        x = x + (sigmas[t - 1] - sigmas[t]) * net(x, sigmas[t])
    torch.testing.assert_close(end, x.detach())
    for net in nets:
        net.forwards.clear()
    swaps = [within(1, t, T) for t in range(T + 1)]
    scheduled_rollouts(nets, [*swaps, swaps[0]], noise, sigmas)
    assert [len(net.forwards) for net in nets] == [T, T * (T + 1) // 2]


@pytest.mark.parametrize("first,last", [(0, 2), (3, 1), (2, T + 1)])
def test_a_range_outside_the_steps_is_refused(first: int, last: int):
    with pytest.raises(UserError, match=f"steps {first}-{last}: expected two of the 4 sampling steps"):
        within(first, last, T)

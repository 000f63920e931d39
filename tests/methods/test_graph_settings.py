"""Everything, block inputs or only the model's inputs kept: the same gradient for every method."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from leapalign.flow.graph import inputs_only, own_backward
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
from leapalign.methods.alignprop import AlignPropDraws
from leapalign.methods.draft import DRaFTDraws
from leapalign.methods.draft_lv import DRaFTLVDraws
from leapalign.methods.drtune import DRTuneDraws
from leapalign.methods.flowbp_bridge import BridgeDraws
from leapalign.methods.flowbp_lagrange import LagrangeDraws
from leapalign.methods.flowbp_sparse import SparseDraws
from leapalign.methods.leapalign import LeapDraws
from leapalign.methods.refl import ReFLDraws
from leapalign.methods.rsm import RSMDraws
from small_problem import Net, grid, noise, train_once

EPS = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
CASES = [
    (LeapAlign(), LeapDraws((6, 3))),
    (LeapAlign(num_leaps=1), LeapDraws((5,))),
    (LeapAlign(num_leaps=3, reward_input="x_hat"), LeapDraws((8, 4, 1))),
    (LeapAlign(nested_only=True), LeapDraws((8, 4))),
    (ReFL(), ReFLDraws(3)),
    (DRaFT(num_last_steps=4), DRaFTDraws()),
    (DRaFTLV(), DRaFTLVDraws(EPS)),
    (DRTune(), DRTuneDraws(s=2, t_min=2)),
    (AlignProp(), AlignPropDraws(5)),
    (FlowBPSparse(), SparseDraws((7, 4, 1))),
    (FlowBPBridge(nested_scale=0.7), BridgeDraws(j=3, above=(8, 5), below=(2, 1))),
    (FlowBPLagrange(nested_scale=0.7), LagrangeDraws(k=7, j=3)),
    (RSM(), RSMDraws(torch.arange(8, 0, -1)[:, None])),
]


@pytest.mark.parametrize("method, draws", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_setting_gives_the_same_gradient(method, draws, dtype):
    net, x, sigmas = Net(dtype), noise(dtype=dtype), grid(8, dtype)
    everything = train_once(method, net, x, sigmas, draws)
    inputs = train_once(method, net, x, sigmas, draws, inputs_only(net))
    own = train_once(method, net, x, sigmas, draws, own_backward(net))
    net.block_checkpoint = True
    blocks = train_once(method, net, x, sigmas, draws)
    own_blocks = train_once(method, net, x, sigmas, draws, own_backward(net))
    both = train_once(method, net, x, sigmas, draws, inputs_only(net))
    assert everything.abs().max() > 1e-3
    for other in (inputs, own, blocks, own_blocks, both):
        assert torch.equal(other, everything)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_leapaligns_saved_numbers_do_not_grow_with_the_number_of_steps(n):
    def saved(num_steps: int) -> int:
        net, numbers = Net(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            steps = tuple(range(2 * n, 0, -2))
            LeapAlign(num_leaps=n)(net, noise(), grid(num_steps), LeapDraws(steps))
        return sum(numbers)

    assert saved(8) == saved(50) > 0

"""Shard the policy: FSDP2's `fully_shard` on every repeated block, then on the root module.

Between forwards a rank holds its shard of each weight (a DTensor) and, for trained weights, the same shard of gradient,
moments and average. If some weights are frozen (LoRA), only these are sharded; the trained ones, which are small, stay
whole on every rank. float32 adapters and their bfloat16 base then need no common FSDP group, and ranks exchange only
the adapters' gradients.

Gradients are summed, not averaged: the loss is divided by the whole batch already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from leapalign.distributed.choice import QUANTISED, choose, shared_by
from leapalign.distributed.tensors import whole
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.run import Run
from leapalign.tuning.quantization import Quantised


class Recomputation:
    """Context in which each block is resharded after its forward.

    FSDP2 keeps weights gathered after a forward in the backward pass, which suits a block that is recomputed just
    before its own backward. If the whole policy is recomputed, all blocks would be gathered at once.
    """

    def __init__(self) -> None:
        self.active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def hook(self, module: FSDPModule, _inputs: Any, _output: Any) -> None:
        """Reshard the group; the forward hook of every FSDP group."""
        if self.active:
            module.reshard()


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A policy whose weights are sharded over the ranks."""

    policy: FSDPModule
    shell: nn.Module  # the same policy on the meta device; takes the gathered weights for saving
    gather_in_rollout: bool
    recomputation: Recomputation  # wraps a forward of the whole policy in the backward pass

    def before_forward(self) -> None:
        """With `gather_in_rollout`, a forward without graph keeps the weights gathered."""
        if self.gather_in_rollout:
            self.policy.set_reshard_after_forward(torch.is_grad_enabled())

    def reshard(self) -> None:
        """Free all gathered weights."""
        for module in _groups(self.policy):
            module.reshard()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Context for forwards between which no weight changes; reshards all weights on leaving."""
        try:
            yield
        finally:
            if self.gather_in_rollout:
                self.policy.set_reshard_after_forward(True)
                self.reshard()

    def whole_policy(self, keep: bool, *, frozen: bool) -> nn.Module | None:
        """Gather the policy to the CPU: returned where `keep` is true, else None. Every rank must call it.

        Without `frozen`, only trained weights get values, and the others stay on the meta device.
        """
        state = {}
        for name, p in self.policy.named_parameters():  # type: ignore[attr-defined]
            if frozen or p.requires_grad:
                tensor = whole(p.detach())
                if keep:
                    state[name] = tensor.cpu()
        if not keep:
            return None
        policy = copy.deepcopy(self.shell)
        policy.load_state_dict(state, strict=False, assign=True)
        return policy


def shard(run: Run, policy: nn.Module, world: World, device: str) -> Shards | None:
    """Shard the policy if the run asks for it, else return None. Raises UserError if it cannot be sharded."""
    if not choose(run, policy, world, device).sharded:
        return None
    if isinstance(policy, Quantised):
        raise UserError(QUANTISED)
    shell = _shell(policy)
    mesh = mesh_of(run, world, device)
    trained = {p for p in policy.parameters() if p.requires_grad}
    whole_on_each = trained if len(trained) < len(list(policy.parameters())) else set()
    for module in (*repeated_blocks(policy), policy):
        # the root is resharded too: if it stayed gathered, it would miss the next update of its weights
        fully_shard(
            module, mesh=mesh, reshard_after_forward=True, ignored_params=whole_on_each, mp_policy=_precision(run)
        )
    recomputation = Recomputation()
    for module in _groups(policy):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.register_forward_hook(recomputation.hook)  # type: ignore[attr-defined]
    settings = {"gather_in_rollout": run.gather_in_rollout, "recomputation": recomputation}
    return Shards(policy=policy, shell=shell, **settings)  # type: ignore[arg-type]


def _precision(run: Run) -> MixedPrecisionPolicy:
    """Gather weights in `run.gather_dtype`, sum gradients over the ranks in float32."""
    if run.gather_dtype == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def repeated_blocks(policy: nn.Module) -> list[nn.Module]:
    """List the repeated blocks: the elements of the policy's own nn.ModuleLists."""
    return [block for child in policy.children() if isinstance(child, nn.ModuleList) for block in child]


def _groups(policy: Any) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def mesh_of(run: Run, world: World, device: str) -> DeviceMesh:
    """Device mesh of the ranks: (shard) or, for hybrid sharding, (replicate, shard). `device`: a device or its type."""
    device, inner = device.partition(":")[0], shared_by(run, world)
    if run.sharding != "hybrid":
        return init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world.size // inner, inner), mesh_dim_names=("replicate", "shard"))


def _shell(policy: nn.Module) -> nn.Module:
    """Copy the policy with its weights on the meta device; the copy keeps the model's class."""
    memo: dict[int, Any] = {}
    for p in policy.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(policy, memo)

"""Tensors by name, whole or sharded over the ranks (DTensor): gather, take the local part, copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Named = Mapping[str, Tensor]


@torch.no_grad()
def copy_into(targets: Named, values: Named) -> None:
    """Write values into the tensors of the same names; whole values into sharded tensors too."""
    for name, target in targets.items():
        target.copy_(like(values[name], target))


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all ranks must call it for the same tensors. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """Shard a whole tensor, present on every rank, like `target`, without communication; else return `value`."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)

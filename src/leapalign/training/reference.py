"""The model at the start of training, for the velocity anchor: a copy of the trained weights' first values.

Only trained weights are copied: an adapter's few, or those of full fine-tuning. With sharded weights a rank copies its
shards. In a bfloat16 run the weights of linear and convolution layers, which autocast casts to it anyway, are kept in
bfloat16: half the memory, and the same velocity to the last bit.

The copy may stay in CPU memory (`Run.base_copy`): then each repeated block of the policy has the base's weights on the
device for the time of its own forward only, and what is outside the blocks for the whole context. Copies come from
page-locked memory on the device's own stream, so the host does not wait, but a forward takes the time of the transfer
more. The numbers are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leapalign.distributed.fsdp import Shards, repeated_blocks
from leapalign.distributed.tensors import Named
from leapalign.training.weights import exchange

CAST = (nn.Linear, nn.Conv2d)  # layers whose weights autocast casts


class Reference:
    """The values of the trained weights when this was made.

    `bfloat16`: whether forwards run under autocast in bfloat16. `in_cpu_memory`: where the values are kept, instead of
    beside the weights; not with `shards`.
    """

    def __init__(
        self,
        policy: nn.Module,
        parameters: Named,
        *,
        bfloat16: bool,
        shards: Shards | None,
        in_cpu_memory: bool = False,
    ) -> None:
        self.policy, self.parameters, self.shards, self.in_cpu_memory = policy, parameters, shards, in_cpu_memory
        layers = [module for module in policy.modules() if bfloat16 and isinstance(module, CAST)]
        cast = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        self.copies: Named = {}
        for name, p in parameters.items():
            half = id(p) in cast and not isinstance(p, DTensor)
            copy = p.detach().to(torch.bfloat16 if half else p.dtype, copy=True)
            self.copies[name] = _in_cpu_memory(copy) if in_cpu_memory else copy

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the policy has these weights; without gradient. Its own are restored bit for bit.

        Whole weights are exchanged by reference, shards by copying, a tensor at a time, since FSDP keeps tensors of
        its own. Do not read `copies` inside the context. From CPU memory, blocks get their weights as they are called.
        """
        if self.in_cpu_memory:
            with self._block_by_block():
                yield
            return
        own: list[tuple[Tensor, Tensor]] = []
        self._reshard()
        try:
            for name, p in self.parameters.items():
                own.append((p, _exchanged(p, self.copies[name])))
            yield
        finally:
            for p, values in own:
                _exchanged(p, values)
            self._reshard()

    @contextmanager
    def _block_by_block(self) -> Iterator[None]:
        rest = {id(p): (p, self.copies[name]) for name, p in self.parameters.items()}
        with ExitStack() as until_end:
            for block in repeated_blocks(self.policy):
                inside = [rest.pop(id(p)) for p in block.parameters() if id(p) in rest]
                until_end.enter_context(_while_called(block, inside))
            until_end.enter_context(_brought(list(rest.values())))
            yield

    def _reshard(self) -> None:
        if self.shards:  # gathered weights are of the values before
            self.shards.reshard()


def _exchanged(p: Tensor, other: Tensor) -> Tensor:
    """Give `p` the values of `other`; return a tensor with p's own values: p's storage, or `other`'s for a shard."""
    if isinstance(p, DTensor):
        return exchange(p, other)
    own = p.data
    p.data = other
    return own


def _in_cpu_memory(value: Tensor) -> Tensor:
    """Copy to CPU memory, page-locked if the value is on a GPU, so that it comes back without the host's waiting."""
    return value.cpu().pin_memory() if value.is_cuda else value.cpu()


@contextmanager
def _brought(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Context in which each weight has the values of the tensor beside it, copied to the weight's device."""
    own = [p.data for p, _ in pairs]
    try:
        for p, values in pairs:
            p.data = values.to(p.device, non_blocking=True, copy=True)
        yield
    finally:
        for (p, _), values in zip(pairs, own):
            p.data = values


@contextmanager
def _while_called(block: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Context in which the block has these values during each of its forwards."""
    called = ExitStack()

    def enter(*_: Any) -> None:
        called.enter_context(_brought(pairs))

    def leave(*_: Any) -> None:
        called.close()

    hooks = (block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        called.close()
        for hook in hooks:
            hook.remove()

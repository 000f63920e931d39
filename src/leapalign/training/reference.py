"""The model at the start of training, for the velocity anchor: a copy of the trained weights' first values.

Only trained weights are copied: an adapter's few, or those of full fine-tuning. With sharded weights a rank copies its
shards. In a bfloat16 run the weights of linear and convolution layers, which autocast casts to it anyway, are kept in
bfloat16: half the memory, and the same velocity to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leapalign.distributed.fsdp import Shards
from leapalign.distributed.tensors import Named
from leapalign.training.weights import exchange

CAST = (nn.Linear, nn.Conv2d)  # layers whose weights autocast casts


class Reference:
    """The values of the trained weights when this was made.

    `bfloat16`: whether forwards run under autocast in bfloat16.
    """

    def __init__(self, policy: nn.Module, parameters: Named, *, bfloat16: bool, shards: Shards | None) -> None:
        self.parameters, self.shards = parameters, shards
        layers = [module for module in policy.modules() if bfloat16 and isinstance(module, CAST)]
        cast = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        self.copies: Named = {}
        for name, p in parameters.items():
            half = id(p) in cast and not isinstance(p, DTensor)
            self.copies[name] = p.detach().to(torch.bfloat16 if half else p.dtype, copy=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the policy has these weights; without gradient. Its own are restored bit for bit.

        Whole weights are exchanged by reference, shards by copying, a tensor at a time, since FSDP keeps tensors of
        its own. Do not read `copies` inside the context.
        """
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

"""Count the bytes of tensors: those that autograd saves, and all that are alive at any moment.

Counts the storages of all tensors that operators return, on any device, torch's fake tensors included. Does not see
scratch memory inside one operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.ops.prim.device.default


@dataclass(eq=False)
class LiveBytes(TorchDispatchMode):
    """A dispatch mode that records when each storage that an operator returns is allocated and freed."""

    events: list[tuple[int, int]] = field(default_factory=list)  # (storage's id, + or - bytes), in order of time
    phases: list[tuple[str, int]] = field(default_factory=list)  # (name, number of events before it)
    living: dict[int, int] = field(default_factory=dict)  # address of a storage -> its id in `events`

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # two of three calls only ask for a fake tensor's device
            return args[0].device
        given = {address(t) for t in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if address(tensor) not in given:  # a view of an argument, or a change in place, allocates nothing
                self._made(tensor.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.living or not size:
            return
        which = self.living[place] = len(self.events)
        self.events.append((which, size))
        weakref.finalize(storage, self._freed, place, which, size).atexit = False

    def _freed(self, place: int, which: int, size: int) -> None:
        self.events.append((which, -size))
        self.living.pop(place, None)

    def begin(self, phase: str) -> None:
        self.phases.append((phase, len(self.events)))

    def peaks(self, without: Iterable[Tensor] = ()) -> dict[str, int]:
        """Phase -> peak bytes, without the storages of `without` (tensors that are still alive)."""
        left_out = {self.living[address(t)] for t in without if address(t) in self.living}
        now, highest, starts = 0, dict.fromkeys((name for name, _ in self.phases), 0), dict(self._starts())
        phase = ""
        for index, (which, change) in enumerate([*self.events, (-1, 0)]):
            phase = starts.get(index, phase)
            highest[phase] = max(highest.get(phase, 0), now)  # storages from earlier phases count too
            now += 0 if which in left_out else change
            highest[phase] = max(highest[phase], now)
        return {name: highest[name] for name, _ in self.phases}

    def _starts(self) -> Iterable[tuple[int, str]]:
        return ((index, name) for name, index in self.phases)


class Saved:
    """Saved-tensor hooks that track what autograd saves; `bytes()` counts what is still held, without `besides`."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self.besides = {address(t) for t in besides}
        self.kept: weakref.WeakSet[Kept] = weakref.WeakSet()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # drop the graph: an output that its own node saves would never be freed
        self.kept.add(kept)
        return kept

    def bytes(self) -> int:
        sizes = {address(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in self.kept}
        return sum(size for place, size in sizes.items() if place not in self.besides)


@dataclass(eq=False)
class Kept:
    """A saved tensor, which lives as long as the graph's node that saved it."""

    tensor: Tensor


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

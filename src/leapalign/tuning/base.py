"""The interface of a way of tuning: which weights are trained, and how they are initialised, saved and loaded.

The trained weights are those with `requires_grad`: optimiser, average and checkpoints hold only these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.targets import LoraTargets


class Tuning(Protocol):
    """A way of tuning: chooses the policy's trained weights, and the dtypes of trained and frozen ones."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() accepts one
    name: ClassVar[str]
    output: ClassVar[str]  # the subfolder of the run's folder that `save` fills and `load_tuned` opens
    formats: ClassVar[tuple[str, ...]]  # formats that `export` can write

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype, targets: LoraTargets) -> Any:
        """Load the folder's transformer onto the device, in eval mode (no dropout between rollout and gradient).

        `dtype`: of its computation; trained weights are always float32. `targets`: the family's default layers for
        adapters.
        """
        ...

    def initialise(self, policy: Any, seed: int) -> None:
        """Initialise the weights that the folder lacks, from the seed and the settings alone.

        The policy then equals the base, unless the settings name values to begin with.
        """
        ...

    def in_update(self, policy: Any, seed: int, step: int) -> AbstractContextManager[None]:
        """Return a context for all forwards and backwards of one update; (seed, step) fix all randomness in them."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write the current tuned weights into this folder."""
        ...

    def load_tuned(self, model: Any, saved: str, device: str, dtype: str, strength: float = 1.0) -> Any:
        """Load the tuned model. `model`: the run's model configuration; `saved`: the folder that `save` wrote.

        `strength` in [0, 2]: base + strength (tuned - base) (tuning/strength.py).
        """
        ...

    def export(self, model: Any, saved: str, target: Path, *, format: str, dtype: str, strength: float = 1.0) -> None:
        """Write the tuned weights for other programs into `target`, in this dtype. `format`: one of `formats`.

        `model`, `saved` and `strength`: as in `load_tuned`.
        """
        ...


@runtime_checkable
class QuantisesBase(Protocol):
    """A way of tuning that can quantise the frozen base while it is loaded."""

    @property
    def quantization(self) -> str:
        """Return "none", or a kind of leapalign.tuning.quantization."""
        ...


@runtime_checkable
class HasStart(Protocol):
    """A way of tuning whose training can begin with weights that are given."""

    @property
    def start(self) -> str:
        """Return what training begins with; empty = its own initial weights."""
        ...

"""What a run asks of a way of tuning: which weights are trained, how they begin, what is saved, and how it is opened.

The trained weights are those with `requires_grad`: optimiser, average and checkpoints hold these and no others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.targets import LoraTargets


class Tuning(Protocol):
    """Which weights of the policy are trained, and in which precision they and the others are held."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]
    output: ClassVar[str]  # the folder in the run's folder that `save` fills and `load_tuned` opens
    formats: ClassVar[tuple[str, ...]]  # what `export` can write

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype, targets: LoraTargets) -> Any:
        """The folder's transformer on the device, in eval mode (no dropout between rollout and gradient).

        `dtype` is what it computes in; weights that are trained are float32 in any case. `targets` are the family's
        default layers for adapters.
        """
        ...

    def initialise(self, policy: Any, seed: int) -> None:
        """Weights that the folder does not hold, as a function of the seed alone; the policy is then the base."""
        ...

    def in_update(self, policy: Any, seed: int, step: int) -> AbstractContextManager[None]:
        """Around all forwards and backwards of one update: whatever is random in them is fixed by (seed, step)."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write the tuned weights, as they are now, into this folder."""
        ...

    def load_tuned(self, model: Any, saved: str, device: str, dtype: str) -> Any:
        """The tuned model, loaded: `model` is the run's configuration of it, `saved` what `save` wrote."""
        ...

    def export(self, model: Any, saved: str, target: Path, *, format: str, dtype: str) -> None:
        """Write the tuned weights for other programs into `target`, in this dtype; `model` and `saved` as above."""
        ...

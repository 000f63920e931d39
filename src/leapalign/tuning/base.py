"""What a model asks of a way of tuning: the policy, with the weights that are trained marked by `requires_grad`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from leapalign.models.folder import PipelineFolder


class Tuning(Protocol):
    """Which weights of the policy are trained, and in which precision they and the others are held."""

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype) -> Any:
        """The folder's transformer on the device, in eval mode (no dropout between rollout and gradient).

        `dtype` is what it computes in; weights that are trained are float32 in any case.
        """
        ...

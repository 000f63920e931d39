"""Full fine-tuning, as in the paper (arXiv 2604.15311, Sec. 6.1): all weights of the transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from leapalign.models.folder import PipelineFolder


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """All weights of the transformer, as float32 masters."""

    name: ClassVar[str] = "full"

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype) -> Any:
        """The transformer in float32; under another `dtype` the forward is autocast over these weights."""
        import torch

        from leapalign.models.folder import load_part

        return load_part(folder, "transformer", torch.float32).to(device).requires_grad_(True)


FULL = FullFineTuning()

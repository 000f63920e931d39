"""ShapeWorld's monitor: the entropy of the colours that prompts leave open (`leapalign.geneval.open_colors`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from leapalign.geneval.open_colors import entropy, open_colors
from leapalign.shapeworld.world import COLORS

if TYPE_CHECKING:
    from torch import Tensor


class Told(Protocol):
    """A prompt with GenEval's metadata."""

    @property
    def metadata(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class OpenColors:
    """Counts open colours image by image: K = 6, in the order of `COLORS`."""

    names: tuple[str, ...] = ("open_color_entropy",)

    def measure(self, images: Tensor, prompts: Sequence[Told]) -> Tensor:
        """Count the shapes of each colour in images [B, 3, 32, 32] in [0, 1]: [B, 6], 0 for prompts that name any."""
        import torch

        from leapalign.shapeworld.detector import detect

        counts = [open_colors([p.metadata or {}], [found]) for p, found in zip(prompts, detect(images))]
        return torch.tensor([[count[color] for color in COLORS] for count in counts]).float().reshape(-1, len(COLORS))

    def summary(self, values: Tensor) -> dict[str, float]:
        """Return the entropy in bits of the counts [N, 6]; 0 if there are no such shapes."""
        return {self.names[0]: entropy(dict(zip(COLORS, values.sum(0).tolist())))}

"""ShapeWorld's monitors: the entropy of the colours that prompts leave open, and GenEval's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from leapalign.geneval.open_colors import entropy, open_colors
from leapalign.geneval.rules import judge
from leapalign.shapeworld.world import COLORS

if TYPE_CHECKING:
    from torch import Tensor


class Told(Protocol):
    """A prompt with GenEval's metadata."""

    @property
    def metadata(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class WorldMonitor:
    """Counts open colours and right images by the world's own detector."""

    names: tuple[str, ...] = ("open_color_entropy", "geneval_correct")

    def measure(self, images: Tensor, prompts: Sequence[Told]) -> Tensor:
        """Measure images [B, 3, 32, 32] in [0, 1], with metadata: [B, 7].

        Columns: the shapes of each of the six colours, in the order of `COLORS` and 0 for prompts that name any; 1 if
        the image shows what its prompt claims, else 0.
        """
        import torch

        from leapalign.shapeworld.detector import detect

        rows = []
        for prompt, found in zip(prompts, detect(images)):
            metadata = dict(prompt.metadata or {})
            counts = open_colors([metadata], [found])
            rows.append([*(counts[color] for color in COLORS), judge(metadata, found).correct])
        return torch.tensor(rows).float().reshape(-1, len(COLORS) + 1)

    def summary(self, values: Tensor) -> dict[str, float]:
        """Return the entropy in bits of the counts [N, 6], and the share of right images; 0 if there are none."""
        counts, correct = values.double().split([len(COLORS), 1], dim=1)
        share = float(correct.mean()) if len(correct) else 0.0
        return dict(zip(self.names, (entropy(dict(zip(COLORS, counts.sum(0).tolist()))), share)))

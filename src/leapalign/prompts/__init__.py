"""Sources of prompts, some with GenEval's metadata (docs/prompts.md). Imports no torch.

User files and the embedded world are defined here, published sets in sets.py, GenEval's prompts in geneval.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from leapalign.prompts.base import ImageMonitor, Prompt, Prompts, check_generated
from leapalign.prompts.geneval import GenEvalPrompts
from leapalign.prompts.sets import DrawBench, HPDv2, MJHQ30k

__all__ = [
    "DrawBench",
    "GenEvalPrompts",
    "HPDv2",
    "MJHQ30k",
    "Prompt",
    "PromptFile",
    "Prompts",
    "ShapeWorldPrompts",
]


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A .txt (a prompt a line), .jsonl (objects with "prompt") or .csv file (a column "prompt"), in UTF-8."""

    name: ClassVar[str] = "file"
    licence: ClassVar[str] = "yours"

    path: str  # the file

    def load(self) -> list[Prompt]:
        from leapalign.prompts.files import read_prompts

        return read_prompts(self.path)


@dataclass(frozen=True, kw_only=True)
class ShapeWorldPrompts:
    """Generated prompts of the embedded world: its six tasks in GenEval's ratio, with metadata."""

    name: ClassVar[str] = "shapeworld"
    licence: ClassVar[str] = "Apache-2.0 (ours)"

    split: Literal["train", "validation", "test"] = "train"
    """Test combinations never appear among the others; validation, for choosing settings, has training combinations."""
    num: int = 4096
    """Prompts in total (train) or per task (validation, test)."""
    seed: int = 0
    """Selects the training and validation prompts; not the run's seed."""

    def __post_init__(self) -> None:
        check_generated("shapeworld", self.num, self.seed)

    def load(self) -> list[Prompt]:
        from leapalign.shapeworld import captions

        if self.split == "train":
            records = captions.train_prompts(self.num, self.seed)
        elif self.split == "validation":
            records = captions.validation_prompts(self.num, self.seed)
        else:
            records = captions.evaluation_prompts(self.num)
        return [Prompt(text=record["prompt"], metadata=record) for record in records]

    def monitor(self) -> ImageMonitor:
        """The entropy of open colours and GenEval's verdict, by the world's detector."""
        from leapalign.shapeworld.monitor import WorldMonitor

        return WorldMonitor()

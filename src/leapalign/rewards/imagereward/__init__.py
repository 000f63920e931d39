"""ImageReward (arXiv 2304.05977): BLIP's text tower attends to the image, and a small head scores it.

The published checkpoint is read unchanged and runs on transformers' BLIP classes. The score is standardised with the
published mean and deviation of the training set.

Departures: none known. Prompts are cut to 35 tokens, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.rewards.base import DescribedReward, Source, Weightless
from leapalign.rewards.sources import BERT_TOKENIZER, is_here, processor_for, published

if TYPE_CHECKING:
    from leapalign.rewards.imagereward.model import BlipReward

PROCESSOR = "google-bert/bert-base-uncased"
FILES = ("ImageReward.pt", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class ImageReward(DescribedReward):
    """ViT-L/16, BERT with cross-attention, linear head; (head - mean) / deviation."""

    name: ClassVar[str] = "imagereward"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "224 (shortest edge, centre crop; the checkpoint's own number counts)"
    prompt_length: ClassVar[str] = "35 tokens"
    output_range: ClassVar[str] = "unbounded, published model about -2.3 to 2"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "Apache-2.0 according to its repository: see the model card"
    memory: ClassVar[str] = "1.8 GB in float32 (446 M parameters)"

    path: str = "THUDM/ImageReward"
    """The checkpoint file (.pt or .safetensors, original key names), or a folder or hub id that holds it."""
    processor: str = ""
    """Folder or hub id of BERT's uncased tokenizer; empty: beside a local checkpoint, or else google-bert/..."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> BlipReward:
        """Load the reward. `prompts=False`: it scores token ids alone, and no tokenizer is needed."""
        from leapalign.rewards.imagereward.model import load_imagereward

        return load_imagereward(self.name, self.path, FILES, self._processor(), device, dtype, prompts=prompts)

    def sources(self) -> tuple[Source, ...]:
        tokenizer = {PROCESSOR: ("tokenizer.json", 470_000)}
        return (
            published("path", self.path, {"THUDM/ImageReward": (FILES[0], 1_790_000_000)}),
            published("processor", self._processor(), tokenizer, weights=False),
        )

    def weightless(self) -> Weightless | None:
        if is_here(self.path):
            return None
        from leapalign.rewards.imagereward import sizes

        return sizes.imagereward()

    def _processor(self) -> str:
        return processor_for(self.path, self.processor, BERT_TOKENIZER, PROCESSOR)

"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while looking at the picture, and a small head scores it.

The published checkpoint is read as it is and runs on transformers' BLIP classes. The score is standardised with the
published mean and deviation of the training set.

Departures: none known. The text is cut to 35 tokens as published, so that the end of a long prompt has no influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from leapalign.rewards.imagereward.model import BlipReward

FILES = ("ImageReward.pt", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class ImageReward:
    """ViT-L/16, BERT with cross-attention, linear head; (head - mean) / deviation."""

    name: ClassVar[str] = "imagereward"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "224 (shortest edge, centre crop; the checkpoint's own number counts)"
    output_range: ClassVar[str] = "unbounded, published model about -2.3 to 2"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "Apache-2.0 according to its repository: see the model card"
    memory: ClassVar[str] = "1.8 GB in float32 (446 M parameters)"

    path: str = "THUDM/ImageReward"
    """The checkpoint file (.pt or .safetensors, original key names), or a folder or hub id that has it."""
    processor: str = "google-bert/bert-base-uncased"
    """Folder or hub id of BERT's uncased tokenizer; empty: beside the checkpoint."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> BlipReward:
        """`prompts=False`: only token ids will be scored, so that no tokenizer is needed."""
        from leapalign.rewards.imagereward.model import load_imagereward

        return load_imagereward(self.name, self.path, FILES, self.processor, device, dtype, prompts=prompts)

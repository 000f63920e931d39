"""HPSv2 and HPSv2.1 (arXiv 2306.09341): the cosine of a CLIP ViT-H/14 that was tuned on human preferences.

The published checkpoint is read unchanged and runs on transformers' `CLIPModel`, without open_clip or LAION's base
weights. Images are not cropped: the longest side becomes 224 and zeros (black) pad the rest.

Departures: a non-square image whose longer side is already 224 is padded, which the published code does not do. HTML
entities in captions are not decoded, and `<end_of_text>` in a caption is plain text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from leapalign.rewards.base import DescribedReward, Source, Weightless
from leapalign.rewards.sources import CLIP_TOKENIZER, is_here, processor_for, published

if TYPE_CHECKING:
    from leapalign.rewards.clip.model import ClipReward

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}


@dataclass(frozen=True, kw_only=True)
class HPSv2(DescribedReward):
    """Human Preference Score: the cosine, as published. Tables of HPSv2's own benchmark show it times 100."""

    name: ClassVar[str] = "hpsv2"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "224 (longest side, padded with zeros; the checkpoint's own number counts)"
    prompt_length: ClassVar[str] = "77 tokens (the checkpoint's own number counts)"
    output_range: ClassVar[str] = "[-1, 1], published v2.1 about 0.2 to 0.42"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "Apache-2.0 according to its repository: see the model card"
    memory: ClassVar[str] = "3.9 GB in float32 (ViT-H/14, 986 M parameters)"

    path: str = "xswu/HPSv2"
    """The checkpoint file (.pt or .safetensors, original key names), or a folder or hub id that holds it."""
    version: Literal["2.1", "2.0"] = "2.1"
    """Which file of a folder or hub id; one architecture, one scale. Ignored if `path` is a file."""
    processor: str = ""
    """Folder or hub id of CLIP's tokenizer; empty: beside a local checkpoint, or else laion/CLIP-ViT-H-14-..."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> ClipReward:
        """Load the reward. `prompts=False`: it scores token ids alone, and no tokenizer is needed."""
        from leapalign.rewards.hpsv2.model import load_hpsv2

        files = (FILES[self.version], "model.safetensors")
        return load_hpsv2(self.name, self.path, files, self._processor(), device, dtype, prompts=prompts)

    def sources(self) -> tuple[Source, ...]:
        tokenizer = {PROCESSOR: ("tokenizer.json", 3_600_000)}
        return (
            published("path", self.path, {"xswu/HPSv2": (FILES[self.version], 1_972_000_000)}),
            published("processor", self._processor(), tokenizer, weights=False),
        )

    def weightless(self) -> Weightless | None:
        if is_here(self.path):
            return None
        from leapalign.rewards.clip import sizes

        return sizes.cosine(self.name, sizes.vit_h, pad=True)

    def _processor(self) -> str:
        return processor_for(self.path, self.processor, CLIP_TOKENIZER, PROCESSOR)

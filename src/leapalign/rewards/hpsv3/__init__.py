"""HPSv3 (arXiv 2508.03789): human preference, predicted by Qwen2-VL-7B from an image, its prompt and an instruction.

The network returns mean and log standard deviation of a preference score; the reward is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.rewards.base import DescribedReward, Source, Weightless
from leapalign.rewards.sources import CLIP_TOKENIZER, is_here, processor_for, published

if TYPE_CHECKING:
    from leapalign.rewards.hpsv3.model import HPSv3Reward

PROCESSOR = "Qwen/Qwen2-VL-7B-Instruct"
PROCESSOR_FILES = tuple((*tokenizer, "config.json") for tokenizer in CLIP_TOKENIZER)  # byte-level BPE, like CLIP's


@dataclass(frozen=True, kw_only=True)
class HPSv3(DescribedReward):
    """Qwen2-VL with a head of three layers on the hidden state of a token <|Reward|>, in the published conventions."""

    name: ClassVar[str] = "hpsv3"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "about 448 x 448 = 200,704 pixels at the image's own ratio, in blocks of 28 (bicubic)"
    prompt_length: ClassVar[str] = "no limit"
    output_range: ClassVar[str] = "unbounded, published model about 0 to 16; FLUX.1-dev 10.8 (MJHQ) to 13.5 (HPDv2)"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers); the instruction's text is MIT (hpsv3)"
    weights_licence: ClassVar[str] = "not stated here: see the model card (Apache-2.0 by a copy's card, unverified)"
    memory: ClassVar[str] = "15.5 GB in bfloat16 without the unused lm_head (7.75 G parameters), and the graph"

    path: str = "MizzenAI/HPSv3"
    """HPSv3.safetensors, a folder with it, or a hub id."""
    processor: str = ""
    """Folder or hub id of the backbone's config.json and tokenizer (its weights are not needed); empty: beside a local
    checkpoint, or else Qwen/Qwen2-VL-7B-Instruct."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> HPSv3Reward:
        """Load the reward. `prompts=False`: it scores token ids alone, and `processor` needs no tokenizer."""
        from leapalign.rewards.hpsv3.model import load_hpsv3

        return load_hpsv3(self.name, self.path, self._processor(), device, dtype, prompts=prompts)

    def sources(self) -> tuple[Source, ...]:
        tokenizer = {PROCESSOR: ("tokenizer.json", 7_000_000)}
        return (
            published("path", self.path, {"MizzenAI/HPSv3": ("HPSv3.safetensors", 16_600_000_000)}),
            published("processor", self._processor(), tokenizer, weights=False),
        )

    def weightless(self) -> Weightless | None:
        if is_here(self.path):
            return None
        from leapalign.rewards.hpsv3 import sizes

        return sizes.hpsv3()

    def _processor(self) -> str:
        return processor_for(self.path, self.processor, PROCESSOR_FILES, PROCESSOR)

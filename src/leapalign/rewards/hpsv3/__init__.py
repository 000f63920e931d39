"""HPSv3 (arXiv 2508.03789): what people prefer, read by Qwen2-VL-7B from a picture, its prompt and a long instruction.

The network answers with the mean and the logarithm of the spread of a preference score; the reward is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from leapalign.rewards.hpsv3.model import HPSv3Reward


@dataclass(frozen=True, kw_only=True)
class HPSv3:
    """Qwen2-VL with a head of three layers on the hidden state of a token <|Reward|>, in the published conventions."""

    name: ClassVar[str] = "hpsv3"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "about 448 x 448 = 200,704 pixels at the picture's own ratio, in blocks of 28 (bicubic)"
    output_range: ClassVar[str] = "unbounded, published model about 0 to 16; FLUX.1-dev 10.8 (MJHQ) to 13.5 (HPDv2)"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers); the instruction's text is MIT (hpsv3)"
    weights_licence: ClassVar[str] = "not stated here: see the model card (Apache-2.0 by a copy's card, unverified)"
    memory: ClassVar[str] = "15.5 GB in bfloat16 without the unused lm_head (7.75 G parameters), and the graph"

    path: str = "MizzenAI/HPSv3"
    """HPSv3.safetensors, a folder with it, or a hub id."""
    processor: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id with the backbone's config.json and tokenizer; its weights are not needed."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> HPSv3Reward:
        """`prompts=False`: only token ids will be scored, so that `processor` needs no tokenizer."""
        from leapalign.rewards.hpsv3.model import load_hpsv3

        return load_hpsv3(self.name, self.path, self.processor, device, dtype, prompts=prompts)

"""UnifiedReward (arXiv 2503.05236): Qwen2.5-VL writes scores from 1 to 5 as text. For evaluation: text has no gradient.

Includes both published prompts whose answers have lines for Alignment, Coherence and Style. The LeapAlign paper (arXiv
2604.15311) reports "UnifiedReward-Alignment" and "-IQ" without prompt or version. Alignment is the line of that name.
The paper does not define IQ (image quality): our `aspect="quality"` reads the Coherence line (glitches, distortions)
or, with `quality="style"`, the Style line (appeal); state which one beside a number.

Departures: an answer without the line gives NaN and is counted, where public training code takes 0; numbers outside
[0, 5], or possibly cut by the length limit, are rejected; decoding is greedy, regardless of generation_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Source

if TYPE_CHECKING:
    from leapalign.rewards.unified.model import UnifiedJudge


@dataclass(frozen=True, kw_only=True)
class UnifiedReward(DescribedReward):
    """Alignment of an image with its prompt, or its quality, read out of a generated text."""

    name: ClassVar[str] = "unified"
    differentiable: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "the image's own, in blocks of 28 pixels (the folder's min_pixels and max_pixels count)"
    prompt_length: ClassVar[str] = "no limit"
    output_range: ClassVar[str] = "1 to 5, or NaN (counted in `failures`); FLUX.1-dev about 3.5"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "not stated here: see the model card (MIT, unverified)"
    memory: ClassVar[str] = "16.6 GB in bfloat16 (Qwen2.5-VL-7B)"

    path: str = "CodeGoat24/UnifiedReward-qwen-7b"
    """A folder of a transformers Qwen2_5_VLForConditionalGeneration, or a hub id."""
    processor: str = ""
    """Folder or hub id of tokenizer and preprocessor_config.json; empty: same as `path`."""
    aspect: Literal["alignment", "quality"] = "alignment"
    quality: Literal["coherence", "style"] = "coherence"
    """Line that aspect=quality reads; our choice, see above."""
    version: Literal["1", "2"] = "1"
    """1: scores each word first (UnifiedReward-qwen-*); 2: without that part (UnifiedReward-2.0-qwen-*)."""
    max_new_tokens: int = 4096
    """Length limit of the answer in tokens, as published; a cut answer may not parse."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"{self.name}: max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def load(self, device: str = "cpu", dtype: str = "float32") -> UnifiedJudge:
        from leapalign.rewards.unified.model import Question, load_unified

        axis = "alignment" if self.aspect == "alignment" else self.quality
        question = Question(
            template=f"prompt_{self.version}.txt", axis=axis.capitalize(), max_new_tokens=self.max_new_tokens
        )
        return load_unified(self.name, self.path, self.processor or self.path, question, device, dtype)

    def sources(self) -> tuple[Source, ...]:
        texts = (Source(field="processor", path=self.processor, weights=False),) if self.processor else ()
        return Source(field="path", path=self.path), *texts

"""PickScore (arXiv 2305.01569) and CLIPScore (arXiv 2104.08718): the cosine between an image and its prompt.

Both run on any folder of a transformers `CLIPModel` with safetensors weights: published or embedded, local or hub id.
Papers use different scales; the scale is a field here, and scores are not rescaled elsewhere.

Departure: published CLIPScores end in max(., 0), whose gradient is zero for poorly matching images. It is omitted
unless `clamp` is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from leapalign.rewards.base import DescribedReward, Source, Weightless
from leapalign.rewards.sources import is_here, published

if TYPE_CHECKING:
    from leapalign.rewards.clip.model import ClipReward

Convention = Literal["cosine", "hessel", "torchmetrics"]
FILES = {
    "yuvalkirstain/PickScore_v1": ("model.safetensors", 3_944_000_000),
    "openai/clip-vit-large-patch14": ("model.safetensors", 1_710_000_000),
}


@dataclass(frozen=True, kw_only=True)
class PickScore(DescribedReward):
    """A CLIP trained on human choices between images. Preprocessing: shortest edge, centre crop, floor."""

    name: ClassVar[str] = "pickscore"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "224 (shortest edge, centre crop; the folder's own number counts)"
    prompt_length: ClassVar[str] = "77 tokens (the model's own number counts)"
    output_range: ClassVar[str] = "[-1, 1], published model about 0.2; output=logit: x exp(logit_scale), about 100"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "not stated here: see the model card (its repository is MIT, unverified)"
    memory: ClassVar[str] = "3.9 GB in float32 (ViT-H/14, 986 M parameters)"

    path: str = "yuvalkirstain/PickScore_v1"
    """A CLIPModel folder, a hub id, or embedded:reward / embedded:judge."""
    processor: str = ""
    """Folder or hub id of tokenizer and preprocessor_config.json; empty: same as `path`."""
    output: Literal["cosine", "logit"] = "cosine"
    """cosine: the scale of the paper's threshold 0.4. logit: exp(logit_scale) x cosine, the scale of tables."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> ClipReward:
        """Load the reward. `prompts=False`: it scores token ids alone, and the folder needs no tokenizer."""
        from leapalign.rewards.clip.model import Head, load_clip_reward

        head = Head(logit_scale=self.output == "logit")
        return load_clip_reward(self.name, self.path, self.processor, head, device, dtype, prompts=prompts)

    def sources(self) -> tuple[Source, ...]:
        return _sources(self.path, self.processor)

    def weightless(self) -> Weightless:
        from leapalign.rewards.clip import sizes

        return sizes.of_folder(self.name, self.path) if is_here(self.path) else sizes.cosine(self.name, sizes.vit_h)


@dataclass(frozen=True, kw_only=True)
class CLIPScore(DescribedReward):
    """An untuned CLIP, in three named conventions that differ in scale, caption prefix and crop.

    | convention   | score                | caption             | odd crop remainder     |
    |--------------|----------------------|---------------------|------------------------|
    | cosine       | cos                  | as it is            | half to even (OpenAI)  |
    | hessel       | 2.5 cos              | "A photo depicts …" | half to even (OpenAI)  |
    | torchmetrics | 100 cos              | as it is            | floor (transformers)   |
    """

    name: ClassVar[str] = "clipscore"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "224 (shortest edge, centre crop; the folder's own number counts)"
    prompt_length: ClassVar[str] = "77 tokens (the model's own number counts)"
    output_range: ClassVar[str] = "[-1, 1], usually 0.1 to 0.35; hessel x 2.5, torchmetrics x 100"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "not stated here: see the model card (OpenAI's CLIP repository is MIT, unverified)"
    memory: ClassVar[str] = "1.7 GB in float32 (ViT-L/14)"

    path: str = "openai/clip-vit-large-patch14"
    """A CLIPModel folder, a hub id, or embedded:reward / embedded:judge. OpenAI's need hidden_act quick_gelu."""
    processor: str = ""
    """Folder or hub id of tokenizer and preprocessor_config.json; empty: same as `path`."""
    convention: Convention = "cosine"
    clamp: bool = False
    """True: the published max(., 0), for tables. It has no gradient below 0."""

    def load(self, device: str = "cpu", dtype: str = "float32", *, prompts: bool = True) -> ClipReward:
        """Load the reward. `prompts=False`: it scores token ids alone, and the folder needs no tokenizer."""
        from leapalign.rewards.clip.model import Head, load_clip_reward

        scale = {"cosine": 1.0, "hessel": 2.5, "torchmetrics": 100.0}[self.convention]
        head = Head(
            scale=scale,
            clamp=self.clamp,
            prefix="A photo depicts " if self.convention == "hessel" else "",
            rounding="floor" if self.convention == "torchmetrics" else "half-even",
        )
        return load_clip_reward(self.name, self.path, self.processor, head, device, dtype, prompts=prompts)

    def sources(self) -> tuple[Source, ...]:
        return _sources(self.path, self.processor)

    def weightless(self) -> Weightless:
        from leapalign.rewards.clip import sizes

        return sizes.of_folder(self.name, self.path) if is_here(self.path) else sizes.cosine(self.name, sizes.vit_l)


def _sources(path: str, processor: str) -> tuple[Source, ...]:
    """List the model, and the tokenizer if it is in another place."""
    texts = (Source(field="processor", path=processor, weights=False),) if processor else ()
    return published("path", path, FILES), *texts

"""LAION's aesthetic score v2 (christophschuhmann/improved-aesthetic-predictor): a linear head on a CLIP feature.

It was trained on human ratings from 1 to 10. Prompts are only counted; their text is ignored.

Departures: none known. The head has no activations and is kept as published; see `linear_head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from leapalign.rewards.base import DescribedReward, Source, Weightless
from leapalign.rewards.sources import is_here, published

if TYPE_CHECKING:
    from leapalign.rewards.aesthetic.model import AestheticReward

FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Aesthetic(DescribedReward):
    """Human rating of an image's look, whatever it shows. The CLIP must be OpenAI's ViT-L/14."""

    name: ClassVar[str] = "aesthetic"
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = False
    resolution: ClassVar[str] = "224 (shortest edge, centre crop; the folder's own number counts)"
    prompt_length: ClassVar[str] = "reads no prompt"
    output_range: ClassVar[str] = "unbounded, trained on 1 to 10, usually 4.5 to 7"
    code_licence: ClassVar[str] = "Apache-2.0 (ours, on transformers)"
    weights_licence: ClassVar[str] = "not stated here: see the model card and the head's repository (unverified)"
    memory: ClassVar[str] = "1.2 GB in float32 (vision tower of ViT-L/14, 304 M parameters)"

    path: str = "openai/clip-vit-large-patch14"
    """A CLIPModel folder or hub id. Its config.json must say quick_gelu, with which OpenAI's weights were trained."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """The head's file (sac+logos+ava1-l14-linearMSE.pth or the same keys in safetensors), or its folder or hub id.
    The default is a copy in another repository; whether it equals LAION's file byte for byte is unverified."""
    processor: str = ""
    """Folder or hub id of preprocessor_config.json; empty: same as `path`."""

    def load(self, device: str = "cpu", dtype: str = "float32") -> AestheticReward:
        from leapalign.rewards.aesthetic.model import load_aesthetic

        return load_aesthetic(self.name, self.path, self.head, FILES, self.processor, device, dtype)

    def sources(self) -> tuple[Source, ...]:
        clip = {"openai/clip-vit-large-patch14": ("model.safetensors", 1_710_000_000)}
        settings = (Source(field="processor", path=self.processor, weights=False),) if self.processor else ()
        head = {"trl-lib/ddpo-aesthetic-predictor": (FILES[1], 3_700_000)}
        return published("path", self.path, clip), published("head", self.head, head), *settings

    def weightless(self) -> Weightless | None:
        if is_here(self.path) or is_here(self.head):
            return None
        from leapalign.rewards.aesthetic import sizes

        return sizes.aesthetic()

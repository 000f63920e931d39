"""LAION's aesthetic score on the meta device, with its published sizes."""

from __future__ import annotations

from leapalign.rewards.aesthetic.model import AestheticReward, AestheticScorer
from leapalign.rewards.base import Weightless
from leapalign.rewards.clip.sizes import vit_l
from leapalign.rewards.linear_head import WIDTHS, LinearHead
from leapalign.rewards.preprocess import Preprocess


def aesthetic() -> Weightless:
    """Return the head on OpenAI's ViT-L/14."""

    def make() -> AestheticReward:
        from transformers import CLIPModel

        model = AestheticScorer(CLIPModel(vit_l()), LinearHead((768, *WIDTHS)))
        return AestheticReward(name="aesthetic", model=model, preprocess=Preprocess(size=224, rounding="half-even"))

    return Weightless(make=make, score=lambda reward, images: reward.scores(reward.preprocess(images)), heads=("head",))

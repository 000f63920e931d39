"""LeapAlign: align flow-matching generators with reward gradients (arXiv 2604.15311).

Public names come from here: `from leapalign import LeapAlign, Run`. A name is imported when it is first used, so that
`import leapalign` alone imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leapalign.errors import RunInterrupted, RunStopped, UserError
    from leapalign.evaluation.evaluate import evaluate
    from leapalign.evaluation.sampling import Sampling, draw_images
    from leapalign.evaluation.statistics import compare
    from leapalign.flow.graph import inputs_only
    from leapalign.flow.grids import sigma_grid
    from leapalign.flow.rollout import rollout
    from leapalign.methods import (
        AWM,
        RSM,
        AlignProp,
        DanceGRPO,
        DiffusionNFT,
        DRaFT,
        DRaFTLV,
        DRTune,
        FlowBPBridge,
        FlowBPLagrange,
        FlowBPSparse,
        FlowDPPO,
        FlowGRPO,
        LeapAlign,
        MixGRPO,
        ReFL,
    )
    from leapalign.methods.base import Samples
    from leapalign.methods.objective import Hinge, latent_gradient
    from leapalign.models import SD3, Flux, Flux2Klein, QwenImage, ZImage
    from leapalign.monitors import Band, HeldOut, Monitors, StopWhen
    from leapalign.prompts import (
        DrawBench,
        GenEvalPrompts,
        HPDv2,
        MJHQ30k,
        Prompt,
        PromptFile,
        ShapeWorldPrompts,
    )
    from leapalign.recipes import RECIPES, shapeworld_leapalign
    from leapalign.rewards import (
        OCR,
        Aesthetic,
        CLIPScore,
        Custom,
        HPSv2,
        HPSv3,
        ImageReward,
        JPEGSize,
        PickScore,
        UnifiedReward,
        ValueModel,
    )
    from leapalign.run import RewardTerm, Run
    from leapalign.training.loop import train
    from leapalign.tuning import FullFineTuning, LoRA

    __version__: str

_NAMES = {  # module -> the names that it offers; tests/cli/test_public_api.py compares them with the imports above
    "errors": ("RunInterrupted", "RunStopped", "UserError"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.sampling": ("Sampling", "draw_images"),
    "evaluation.statistics": ("compare",),
    "flow.graph": ("inputs_only",),
    "flow.grids": ("sigma_grid",),
    "flow.rollout": ("rollout",),
    "methods": (
        *("RSM", "AlignProp", "DRTune", "DRaFT", "DRaFTLV", "FlowBPBridge", "FlowBPLagrange", "FlowBPSparse"),
        *("AWM", "DanceGRPO", "DiffusionNFT", "FlowDPPO", "FlowGRPO", "LeapAlign", "MixGRPO", "ReFL"),
    ),
    "methods.base": ("Samples",),
    "methods.objective": ("Hinge", "latent_gradient"),
    "models": ("SD3", "Flux", "Flux2Klein", "QwenImage", "ZImage"),
    "monitors": ("Band", "HeldOut", "Monitors", "StopWhen"),
    "prompts": ("DrawBench", "GenEvalPrompts", "HPDv2", "MJHQ30k", "Prompt", "PromptFile", "ShapeWorldPrompts"),
    "recipes": ("RECIPES", "shapeworld_leapalign"),
    "rewards": (
        *("OCR", "Aesthetic", "CLIPScore", "Custom", "HPSv2", "HPSv3", "ImageReward", "PickScore"),
        *("JPEGSize", "UnifiedReward", "ValueModel"),
    ),
    "run": ("RewardTerm", "Run"),
    "training.loop": ("train",),
    "tuning": ("FullFineTuning", "LoRA"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AWM",
    "OCR",
    "RECIPES",
    "RSM",
    "SD3",
    "Aesthetic",
    "AlignProp",
    "Band",
    "CLIPScore",
    "Custom",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "DanceGRPO",
    "DiffusionNFT",
    "DrawBench",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "FlowDPPO",
    "FlowGRPO",
    "Flux",
    "Flux2Klein",
    "FullFineTuning",
    "GenEvalPrompts",
    "HPDv2",
    "HPSv2",
    "HPSv3",
    "HeldOut",
    "Hinge",
    "ImageReward",
    "JPEGSize",
    "LeapAlign",
    "LoRA",
    "MJHQ30k",
    "MixGRPO",
    "Monitors",
    "PickScore",
    "Prompt",
    "PromptFile",
    "QwenImage",
    "ReFL",
    "RewardTerm",
    "Run",
    "RunInterrupted",
    "RunStopped",
    "Samples",
    "Sampling",
    "ShapeWorldPrompts",
    "StopWhen",
    "UnifiedReward",
    "UserError",
    "ValueModel",
    "ZImage",
    "__version__",
    "compare",
    "draw_images",
    "evaluate",
    "inputs_only",
    "latent_gradient",
    "rollout",
    "shapeworld_leapalign",
    "sigma_grid",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("leapalign")
    if name not in _HOMES:
        raise AttributeError(f"module 'leapalign' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"leapalign.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

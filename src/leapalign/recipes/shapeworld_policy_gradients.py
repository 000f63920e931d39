"""Policy-gradient methods on the embedded pipeline, with the settings that all ShapeWorld recipes share.

The model, prompts, monitors, optimiser and number of updates are `shapeworld`'s, and so is the reward, but for
`shapeworld-flow-grpo-verdict`, whose reward is GenEval's verdict and has no gradient. Four prompts with eight samples
each fill the batch of 32. Departures from the papers: 8 sampling steps, all weights, groups of 8, the learning rate and
the clip ranges, which are wider because log-probabilities are means over 768 numbers and not over 16,384 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leapalign.methods.awm import AWM
from leapalign.methods.dance_grpo import DanceGRPO
from leapalign.methods.diffusion_nft import DiffusionNFT
from leapalign.methods.flow_dppo import FlowDPPO
from leapalign.methods.flow_grpo import FlowGRPO
from leapalign.methods.mix_grpo import MixGRPO
from leapalign.recipes.shapeworld import shapeworld
from leapalign.run import RewardTerm, Run
from leapalign.shapeworld.verdict import ShapeWorldVerdict

CLIP = 1e-3


def shapeworld_flow_grpo() -> Run:
    """Flow-GRPO: all 8 steps with noise, and a divergence from the base."""
    return grouped(FlowGRPO(clip_range=CLIP))


def shapeworld_flow_grpo_verdict() -> Run:
    """Flow-GRPO with GenEval's verdict as the reward, which has no gradient."""
    run, name = shapeworld_flow_grpo(), "shapeworld-flow-grpo-verdict"
    term = RewardTerm(reward=ShapeWorldVerdict(), threshold=1.0)
    return replace(run, name=name, out=f"runs/{name}", rewards=(term,))


def shapeworld_flow_grpo_fast() -> Run:
    """Flow-GRPO-Fast: noise in two steps of the first half, the same beginning within a group."""
    return _named("shapeworld-flow-grpo-fast", FlowGRPO(window=2, same_noise=True, clip_range=CLIP))


def shapeworld_flow_grpo_cps() -> Run:
    """Flow-GRPO with coefficients-preserving sampling."""
    return _named("shapeworld-flow-grpo-cps", FlowGRPO(sampler="cps", noise_level=0.8, clip_range=CLIP))


def shapeworld_flow_grpo_guard() -> Run:
    """Flow-GRPO with GRPO-Guard's centred and scaled ratio."""
    return _named("shapeworld-flow-grpo-guard", FlowGRPO(guard=True, clip_range=CLIP))


def shapeworld_flow_dppo() -> Run:
    """Flow-DPPO: a trust region by divergence; two updates a rollout."""
    return grouped(FlowDPPO(), updates_per_rollout=2)


def shapeworld_dance_grpo() -> Run:
    """DanceGRPO: constant noise, a random 60 % of the steps."""
    return grouped(DanceGRPO(clip_range=CLIP))


def shapeworld_mix_grpo() -> Run:
    """MixGRPO: a window of two noisy steps that moves on every 25 rollouts."""
    return grouped(MixGRPO(window=2, clip_range=CLIP))


def shapeworld_diffusion_nft() -> Run:
    """DiffusionNFT: its average samples and is saved, so the run has no average of its own."""
    return replace(grouped(DiffusionNFT()), ema_decay=0.0)


def shapeworld_awm() -> Run:
    """AWM: flow matching on the model's own samples, weighted by the advantage; four times a sample."""
    return grouped(AWM(num_times=4))


SHAPEWORLD_POLICY_GRADIENTS: dict[str, Callable[[], Run]] = {
    "shapeworld-flow-grpo": shapeworld_flow_grpo,
    "shapeworld-flow-grpo-verdict": shapeworld_flow_grpo_verdict,
    "shapeworld-flow-grpo-fast": shapeworld_flow_grpo_fast,
    "shapeworld-flow-grpo-cps": shapeworld_flow_grpo_cps,
    "shapeworld-flow-grpo-guard": shapeworld_flow_grpo_guard,
    "shapeworld-flow-dppo": shapeworld_flow_dppo,
    "shapeworld-dance-grpo": shapeworld_dance_grpo,
    "shapeworld-mix-grpo": shapeworld_mix_grpo,
    "shapeworld-diffusion-nft": shapeworld_diffusion_nft,
    "shapeworld-awm": shapeworld_awm,
}


def grouped(method: Any, updates_per_rollout: int = 1) -> Run:
    """Return the ShapeWorld run of a policy-gradient method: groups of 8, no velocity anchor."""
    return replace(
        shapeworld(method),
        samples_per_prompt=8,
        micro_batch_size=32 // updates_per_rollout,
        updates_per_rollout=updates_per_rollout,
        anchor_weight=0.0,
        anchor_states="all",
    )


def _named(name: str, method: Any) -> Run:
    return replace(grouped(method), name=name, out=f"runs/{name}")

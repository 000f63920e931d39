"""Runs on the embedded pipeline and reward, without downloads.

The recipes of the methods differ only in the method, so that methods can be compared; LeapAlign's adds stratified pairs
and the stop of a hacked run, and two more recipes show LoRA and guidance. Departures from the paper's numbers (Sec.
6.1), chosen on validation prompts (LOG.md): a small model and few steps need a larger learning rate (3e-4, with warm-up
and decay), a faster average (0.97), an anchor to the base and, for LeapAlign, the whole nested gradient (alpha 1).
The threshold lies between the reward of images that are wrong (median 0.36) and right (0.75), as the paper's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leapalign.methods.alignprop import AlignProp
from leapalign.methods.draft import DRaFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM
from leapalign.models.sd3 import SD3
from leapalign.monitors import Band, HeldOut, Monitors, StopWhen
from leapalign.prompts import ShapeWorldPrompts
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.tuning.lora import LoRA

WATCHED = Monitors(
    held_out=(HeldOut(reward=PickScore(path="embedded:judge")),),
    diversity_prompts=8,
    images_per_prompt=4,
    features="pixels",  # clip-image distances fall where images become right (LOG.md)
    image_statistics=True,
    prompt_monitors=True,
    drift_samples=8,
)
# Wider than what the demo asks for at its end (0.90, 0.85): an evaluation has few images.
HACKED = StopWhen(
    evaluations=2,
    bands=(Band(monitor="open_color_entropy", least=0.85), Band(monitor="diversity/pixels", least=0.75)),
)


def shapeworld_leapalign() -> Run:
    """LeapAlign on the embedded pipeline and reward: minutes on two CPU cores. Ends when the reward is hacked."""
    run = shapeworld(LeapAlign(nested_scale=1.0, step_draws="stratified"))
    return replace(run, skip_satisfied=True, stop_when=HACKED)


def shapeworld_leapalign_lora() -> Run:
    """LeapAlign with LoRA, rank 8: another way of tuning, and a higher rate, as its B begins at 0."""
    run, name = shapeworld_leapalign(), "shapeworld-leapalign-lora"
    return replace(run, name=name, out=f"runs/{name}", tuning=LoRA(rank=8), learning_rate=1e-3)


def shapeworld_leapalign_guided() -> Run:
    """LeapAlign at guidance 4, where the base is nearly at its best: two forwards a step, and a lower rate."""
    run, name = shapeworld_leapalign(), "shapeworld-leapalign-guided"
    model = replace(run.model, guidance_scale=4.0)
    return replace(run, name=name, out=f"runs/{name}", model=model, learning_rate=1e-4)


def shapeworld_refl() -> Run:
    """ReFL at the same budget of updates."""
    return shapeworld(ReFL())


def shapeworld_draft_k() -> Run:
    """DRaFT-K, the last step differentiated."""
    return shapeworld(DRaFT())


def shapeworld_draft_lv() -> Run:
    """DRaFT-LV, two re-noised copies a sample."""
    return shapeworld(DRaFTLV())


def shapeworld_drtune() -> Run:
    """DRTune, two trained steps."""
    return shapeworld(DRTune())


def shapeworld_alignprop() -> Run:
    """AlignProp, random truncation depth; up to the whole chain is kept."""
    return shapeworld(AlignProp())


def shapeworld_flowbp_sparse() -> Run:
    """FlowBP Sparse, three random steps with stopped inputs."""
    return shapeworld(FlowBPSparse())


def shapeworld_flowbp_bridge() -> Run:
    """FlowBP Bridge, five steps on both sides of one that nests the gradient."""
    return shapeworld(FlowBPBridge())


def shapeworld_flowbp_lagrange() -> Run:
    """FlowBP Lagrange, two leaps by quadrature."""
    return shapeworld(FlowBPLagrange())


def shapeworld_rsm() -> Run:
    """RSM, every step towards the base's velocity moved by the reward's gradient; the anchor is part of it."""
    return shapeworld(RSM())


SHAPEWORLD: dict[str, Callable[[], Run]] = {
    "shapeworld-leapalign": shapeworld_leapalign,
    "shapeworld-leapalign-lora": shapeworld_leapalign_lora,
    "shapeworld-leapalign-guided": shapeworld_leapalign_guided,
    "shapeworld-refl": shapeworld_refl,
    "shapeworld-draft-k": shapeworld_draft_k,
    "shapeworld-draft-lv": shapeworld_draft_lv,
    "shapeworld-drtune": shapeworld_drtune,
    "shapeworld-alignprop": shapeworld_alignprop,
    "shapeworld-flowbp-sparse": shapeworld_flowbp_sparse,
    "shapeworld-flowbp-bridge": shapeworld_flowbp_bridge,
    "shapeworld-flowbp-lagrange": shapeworld_flowbp_lagrange,
    "shapeworld-rsm": shapeworld_rsm,
}


def shapeworld(method: Any) -> Run:
    """Return the run that all ShapeWorld recipes share."""
    return Run(
        name=f"shapeworld-{method.name}",
        model=SD3(
            path="embedded:generator", height=32, width=32, guidance_scale=1.0, max_sequence_length=5, decode_chunk=0
        ),
        method=method,
        rewards=(RewardTerm(reward=PickScore(path="embedded:reward"), threshold=0.65),),
        prompts=ShapeWorldPrompts(),
        out=f"runs/shapeworld-{method.name}",
        steps=220,
        batch_size=32,
        micro_batch_size=32,
        num_sampling_steps=8,
        learning_rate=3e-4,
        warmup_steps=15,
        decay_steps=205,
        ema_decay=0.97,
        anchor_weight=0.3,
        anchor_states="first",
        evaluate_every=20,  # with its monitors an evaluation costs about as much as an update
        monitors=WATCHED,
    )

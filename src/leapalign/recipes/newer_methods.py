"""FlowBP (arXiv 2606.11075) on FLUX.1-dev and SD3.5-M, RSM (arXiv 2604.17415) on SD3.5-M: HPSv2.1 on HPDv2.

Taken from FlowBP: its settings for each model, and for SD3.5 the grid that is shifted once. Everything else is that of
`flux-leapalign-hpsv21` and `sd35m-leapalign-hpsv21` (leapalign.recipes.paper), so that methods compare: FlowBP's own
runs have other prompts, rates and rewards.

Taken from RSM's SD3.5 run for HPS: beta 1.5e7 at 512 x 512, LoRA of rank 8, learning rate 5e-4, weight decay 1e-2, 20
steps, guidance 5 without gradient of the branch without prompt. Its batch is smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.rsm import RSM, anchor_weight
from leapalign.recipes.paper import PREFERENCE, flux, sd35m
from leapalign.run import Run
from leapalign.tuning.lora import LoRA

LATENT_NUMBERS = 16 * 64 * 64  # of SD3.5 at 512 x 512


def flux_flowbp_sparse_hpsv21() -> Run:
    """FlowBP Sparse on FLUX.1-dev with HPSv2.1 on HPDv2: K 3, b 2, gamma 1."""
    return flux(FlowBPSparse(num_training_steps=3, image_side_bias=2.0, compensation=1.0), PREFERENCE)


def flux_flowbp_bridge_hpsv21() -> Run:
    """FlowBP Bridge on FLUX.1-dev with HPSv2.1 on HPDv2: K 5, b 2, gamma 1, alpha 0.1."""
    method = FlowBPBridge(num_training_steps=5, image_side_bias=2.0, compensation=1.0, nested_scale=0.1)
    return flux(method, PREFERENCE)


def flux_flowbp_lagrange_hpsv21() -> Run:
    """FlowBP Lagrange on FLUX.1-dev with HPSv2.1 on HPDv2: order 3, gamma 0.5, alpha 0.1, tau 0.2."""
    method = FlowBPLagrange(num_supports=3, compensation=0.5, nested_scale=0.1, distance_floor=0.2)
    return flux(method, PREFERENCE)


def sd35m_flowbp_sparse_hpsv21() -> Run:
    """FlowBP Sparse on SD3.5-M with HPSv2.1 on HPDv2: K 4, b 1, gamma 0.5."""
    return _shifted_once(FlowBPSparse(num_training_steps=4, image_side_bias=1.0, compensation=0.5))


def sd35m_flowbp_bridge_hpsv21() -> Run:
    """FlowBP Bridge on SD3.5-M with HPSv2.1 on HPDv2: K 5, b 4, gamma 0, alpha 0.5."""
    return _shifted_once(FlowBPBridge(num_training_steps=5, image_side_bias=4.0, compensation=0.0, nested_scale=0.5))


def sd35m_flowbp_lagrange_hpsv21() -> Run:
    """FlowBP Lagrange on SD3.5-M with HPSv2.1 on HPDv2: order 3, gamma 0, alpha 0.1, tau 0.2, j at most 11 of 25."""
    return _shifted_once(
        FlowBPLagrange(
            num_supports=3, compensation=0.0, nested_scale=0.1, distance_floor=0.2, longest_image_side=10 / 25
        )
    )


def sd35m_rsm_hpsv21() -> Run:
    """RSM on SD3.5-M with HPSv2.1 on HPDv2: beta 1.5e7, LoRA rank 8, all of 20 steps, guidance 5."""
    run = sd35m(RSM(trained_share=1.0, gradient_quantile=0.8), PREFERENCE)
    return replace(
        run,
        model=replace(run.model, guidance_scale=5.0, cfg_grad="cond"),
        tuning=LoRA(rank=8),
        num_sampling_steps=20,
        learning_rate=5e-4,
        weight_decay=1e-2,
        anchor_weight=anchor_weight(1.5e7, LATENT_NUMBERS),
    )


def _shifted_once(method: Any) -> Run:
    run = sd35m(method, PREFERENCE)
    return replace(run, model=replace(run.model, shift="once"))


_FUNCTIONS = (
    *(flux_flowbp_sparse_hpsv21, flux_flowbp_bridge_hpsv21, flux_flowbp_lagrange_hpsv21),
    *(sd35m_flowbp_sparse_hpsv21, sd35m_flowbp_bridge_hpsv21, sd35m_flowbp_lagrange_hpsv21),
    sd35m_rsm_hpsv21,
)
NEWER: dict[str, Callable[[], Run]] = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS}

"""DanceGRPO and MixGRPO on FLUX.1-dev, Flow-GRPO on SD3.5-M, with their papers' settings.

Taken from the papers and their public settings:
- DanceGRPO (arXiv 2505.07818): 720 x 720, 16 steps, eta 0.3, 60 % of the steps, 12 samples a prompt with one noise,
  learning rate 1e-5, 300 rollouts, clip range 1e-4, no KL.
- MixGRPO (arXiv 2507.21802): 25 steps, a window of 4 that moves on every 25 rollouts, a 0.7, 12 samples a prompt, four
  updates a rollout, clip range 1e-4.
- Flow-GRPO (arXiv 2505.05470): LoRA of rank 32 and alpha 64, learning rate 3e-4, 512 x 512, guidance 4.5, 10 steps, 24
  samples of 48 prompts, a 0.7, beta 0.01 for PickScore, clip range 1e-4. It evaluates at 40 steps:
  `leapalign evaluate RUN --steps 40`.

Our choices, so that they compare with `flux-leapalign-hpsv21` and `sd35m-leapalign-hpsv21` (leapalign.recipes.paper),
whose other settings they have: HPSv2.1 on HPDv2 for FLUX.1, eight prompts a rollout, AdamW's settings, clipping at 1,
EMA 0.995. FLUX.1 keeps its own grid, shifted by 2.2 at 720 x 720, where DanceGRPO and MixGRPO shift by 3. PickScore's
prompts are HPDv2's. An evaluation's images are drawn at the number of training steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leapalign.methods.dance_grpo import DanceGRPO
from leapalign.methods.flow_grpo import FlowGRPO
from leapalign.methods.mix_grpo import MixGRPO
from leapalign.recipes.paper import PICKSCORE, PREFERENCE, flux, sd35m
from leapalign.run import Run
from leapalign.tuning.lora import LoRA

ROLLOUTS = 300


def flux_dance_grpo_hpsv21() -> Run:
    """DanceGRPO on FLUX.1-dev with HPSv2.1 on HPDv2: 12 samples of 8 prompts, 16 steps."""
    return replace(_of_groups(DanceGRPO(eta=0.3, trained_share=0.6)), num_sampling_steps=16)


def flux_mix_grpo_hpsv21() -> Run:
    """MixGRPO on FLUX.1-dev with HPSv2.1 on HPDv2: a window of 4 of 25 steps, four updates a rollout."""
    return _of_groups(MixGRPO(window=4, shift_every=25), updates_per_rollout=4)


def flux_mix_grpo_flash_hpsv21() -> Run:
    """MixGRPO-Flash: two fifths of the steps after the window."""
    run = _of_groups(MixGRPO(window=4, shift_every=25, tail_share=0.4), updates_per_rollout=4)
    return replace(run, name="flux-mix-grpo-flash-hpsv21", out="runs/flux-mix-grpo-flash-hpsv21")


def sd35m_flow_grpo_pickscore() -> Run:
    """Flow-GRPO on SD3.5-M with PickScore on HPDv2: LoRA, 24 samples of 48 prompts, 10 steps."""
    run = sd35m(FlowGRPO(noise_level=0.7, kl_weight=0.01), PICKSCORE)
    return replace(
        run,
        model=replace(run.model, guidance_scale=4.5),
        tuning=LoRA(rank=32, alpha=64),
        batch_size=24 * 48,
        samples_per_prompt=24,
        samples_per_draw=0,
        num_sampling_steps=10,
        learning_rate=3e-4,
    )


def _of_groups(method: Any, updates_per_rollout: int = 1) -> Run:
    steps = ROLLOUTS * updates_per_rollout
    return replace(
        flux(method, PREFERENCE),
        steps=steps,
        batch_size=96,
        samples_per_prompt=12,
        samples_per_draw=0,
        updates_per_rollout=updates_per_rollout,
        checkpoint_every=steps // 3,
    )


PAPER_POLICY_GRADIENTS: dict[str, Callable[[], Run]] = {
    "flux-dance-grpo-hpsv21": flux_dance_grpo_hpsv21,
    "flux-mix-grpo-hpsv21": flux_mix_grpo_hpsv21,
    "flux-mix-grpo-flash-hpsv21": flux_mix_grpo_flash_hpsv21,
    "sd35m-flow-grpo-pickscore": sd35m_flow_grpo_pickscore,
}

"""The paper's runs (arXiv 2604.15311): FLUX.1-dev and SD3.5-M, four methods, its rewards and prompt sets.

Taken from the paper: AdamW, learning rate 1e-5 (HPSv3: 8e-6), betas 0.9 and 0.999, weight decay 1e-4, batch 64, EMA
0.995, 300 updates at 720 x 720 (SD3.5-M: 200 at 512 x 512), 25 steps, guidance 3.5 (Sec. 6.1, App. B); alpha 0.3 for
HPSv2.1 and 0.1 for the others, lambda 0.55, 0.4, 13.5 (App. E); tau 0.1 (Sec. 6.1); n = 2 copies, K = 2 steps, early
stop among the last 11 of 25 (App. E). It evaluates at 50 steps: `leapalign evaluate RUN --steps 50`.

Our choices, where the paper states none:
- one process with micro-batches of one sample (the paper's 16 GPUs hold 4 each); accumulation changes no number;
- four neighbouring samples share (k, j), as if each of the 16 GPUs drew its own;
- gradients are clipped at norm 1, as in public code;
- bfloat16 arithmetic over float32 weights with block checkpointing, without which full fine-tuning would not fit; CLIP
  rewards in float32 (2 GB more, out of some 300), HPSv3 in bfloat16 as published;
- the other methods use LeapAlign's learning rate and lambda, because the paper gives none for them;
- SD3.5-M has FLUX's guidance scale 3.5 ("all other settings follow"), here as true guidance with an empty negative
  prompt and the gradient through both branches, since the paper's v is after guidance; T5 reads 256 tokens, as in
  diffusers;
- the 50,000 prompts of HPDv2 and the 500 of MJHQ-30k are chosen by seed 0 (docs/prompts.md); GenEval's training
  prompts are generated here, in the stated ratio;
- 32 fixed samples are evaluated every 50 updates; one checkpoint is kept, because it takes 16 bytes per weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.models.flux import Flux
from leapalign.models.sd3 import SD3
from leapalign.prompts.geneval import GenEvalPrompts
from leapalign.prompts.sets import HPDv2, MJHQ30k
from leapalign.rewards.clip import PickScore
from leapalign.rewards.hpsv2 import HPSv2
from leapalign.rewards.hpsv3 import HPSv3
from leapalign.run import RewardTerm, Run

EARLY_STOP = 11 / 25  # App. E: "the last 11 generation steps out of the total 25"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reward, its prompts and its hyperparameters (Sec. 6.1, App. E)."""

    name: str
    term: RewardTerm
    prompts: Any
    nested_scale: float  # alpha
    learning_rate: float = 1e-5


HPDV2 = HPDv2(split="train", num=50_000)
HPSV21 = RewardTerm(reward=HPSv2(version="2.1"), threshold=0.55, dtype="float32")
PREFERENCE = Task(name="hpsv21", term=HPSV21, prompts=HPDV2, nested_scale=0.3)
PICKSCORE = Task(
    name="pickscore",
    term=RewardTerm(reward=PickScore(), threshold=0.4, dtype="float32"),
    prompts=HPDV2,
    nested_scale=0.1,
)
HPSV3_MJHQ = Task(
    name="hpsv3-mjhq",
    term=RewardTerm(reward=HPSv3(), threshold=13.5, dtype="bfloat16"),
    prompts=MJHQ30k(split="train"),
    nested_scale=0.1,
    learning_rate=8e-6,
)
GENEVAL = Task(name="geneval", term=HPSV21, prompts=GenEvalPrompts(split="train", num=50_000), nested_scale=0.3)


def flux(method: Any, task: Task) -> Run:
    """FLUX.1-dev, all weights of the transformer (Sec. 6.1)."""
    model = Flux(path="black-forest-labs/FLUX.1-dev", height=720, width=720, guidance_scale=3.5)
    return _run("flux", model, method, task, steps=300)


def sd35m(method: Any, task: Task) -> Run:
    """SD3.5-M (App. B, Table 4)."""
    model = SD3(path="stabilityai/stable-diffusion-3.5-medium", height=512, width=512, guidance_scale=3.5)
    return _run("sd35m", model, method, task, steps=200)


def _run(family: str, model: Any, method: Any, task: Task, steps: int) -> Run:
    name = f"{family}-{method.name}-{task.name}"
    return Run(
        name=name,
        model=model,
        method=method,
        rewards=(task.term,),
        prompts=task.prompts,
        out=f"runs/{name}",
        steps=steps,
        batch_size=64,
        micro_batch_size=1,
        samples_per_draw=4,
        num_sampling_steps=25,
        learning_rate=task.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        max_grad_norm=1.0,
        ema_decay=0.995,
        graph="blocks",
        dtype="bfloat16",
        checkpoint_every=100,
        keep_checkpoints=1,
        evaluate_every=50,
    )


def leapalign(task: Task) -> LeapAlign:
    """Two leaps, tau 0.1 (Sec. 6.1), alpha by reward (App. E)."""
    return LeapAlign(num_leaps=2, nested_scale=task.nested_scale, distance_floor=0.1)


def refl() -> ReFL:
    """Early stop among the last 11 of 25 steps, without pre-training loss (App. E)."""
    return ReFL(early_stop=EARLY_STOP)


def draft_lv() -> DRaFTLV:
    """n = 2 re-noised copies (App. E)."""
    return DRaFTLV(num_copies=2)


def drtune() -> DRTune:
    """K = 2 training steps, early stop as ReFL (App. E)."""
    return DRTune(num_training_steps=2, early_stop=EARLY_STOP)


# Table 2, general preference: FLUX.1-dev, HPSv2.1, HPDv2


def flux_leapalign_hpsv21() -> Run:
    """LeapAlign on FLUX.1-dev with HPSv2.1 on HPDv2 (Sec. 6.1, Table 2)."""
    return flux(leapalign(PREFERENCE), PREFERENCE)


def flux_refl_hpsv21() -> Run:
    """ReFL on FLUX.1-dev with HPSv2.1 on HPDv2 (App. E, Table 2)."""
    return flux(refl(), PREFERENCE)


def flux_draft_lv_hpsv21() -> Run:
    """DRaFT-LV on FLUX.1-dev with HPSv2.1 on HPDv2 (App. E, Table 2)."""
    return flux(draft_lv(), PREFERENCE)


def flux_drtune_hpsv21() -> Run:
    """DRTune on FLUX.1-dev with HPSv2.1 on HPDv2 (App. E, Table 2)."""
    return flux(drtune(), PREFERENCE)


# Table 3: PickScore on HPDv2


def flux_leapalign_pickscore() -> Run:
    """LeapAlign on FLUX.1-dev with PickScore's cosine on HPDv2 (App. E, Table 3)."""
    return flux(leapalign(PICKSCORE), PICKSCORE)


def flux_refl_pickscore() -> Run:
    """ReFL on FLUX.1-dev with PickScore's cosine on HPDv2 (App. E, Table 3)."""
    return flux(refl(), PICKSCORE)


def flux_draft_lv_pickscore() -> Run:
    """DRaFT-LV on FLUX.1-dev with PickScore's cosine on HPDv2 (App. E, Table 3)."""
    return flux(draft_lv(), PICKSCORE)


def flux_drtune_pickscore() -> Run:
    """DRTune on FLUX.1-dev with PickScore's cosine on HPDv2 (App. E, Table 3)."""
    return flux(drtune(), PICKSCORE)


# Table 3: HPSv3 on MJHQ-30k


def flux_leapalign_hpsv3_mjhq() -> Run:
    """LeapAlign on FLUX.1-dev with HPSv3 on MJHQ-30k (App. E, Table 3)."""
    return flux(leapalign(HPSV3_MJHQ), HPSV3_MJHQ)


def flux_refl_hpsv3_mjhq() -> Run:
    """ReFL on FLUX.1-dev with HPSv3 on MJHQ-30k (App. E, Table 3)."""
    return flux(refl(), HPSV3_MJHQ)


def flux_draft_lv_hpsv3_mjhq() -> Run:
    """DRaFT-LV on FLUX.1-dev with HPSv3 on MJHQ-30k (App. E, Table 3)."""
    return flux(draft_lv(), HPSV3_MJHQ)


def flux_drtune_hpsv3_mjhq() -> Run:
    """DRTune on FLUX.1-dev with HPSv3 on MJHQ-30k (App. E, Table 3)."""
    return flux(drtune(), HPSV3_MJHQ)


# Table 2, GenEval: HPSv2.1 on compositional prompts


def flux_leapalign_geneval() -> Run:
    """LeapAlign on FLUX.1-dev with HPSv2.1 on GenEval training prompts (Sec. 6.2, Table 2)."""
    return flux(leapalign(GENEVAL), GENEVAL)


def flux_refl_geneval() -> Run:
    """ReFL on FLUX.1-dev with HPSv2.1 on GenEval training prompts (Sec. 6.2, Table 2)."""
    return flux(refl(), GENEVAL)


def flux_draft_lv_geneval() -> Run:
    """DRaFT-LV on FLUX.1-dev with HPSv2.1 on GenEval training prompts (Sec. 6.2, Table 2)."""
    return flux(draft_lv(), GENEVAL)


def flux_drtune_geneval() -> Run:
    """DRTune on FLUX.1-dev with HPSv2.1 on GenEval training prompts (Sec. 6.2, Table 2)."""
    return flux(drtune(), GENEVAL)


# Table 4: SD3.5-M


def sd35m_leapalign_hpsv21() -> Run:
    """LeapAlign on SD3.5-M with HPSv2.1 on HPDv2 (App. B, Table 4)."""
    return sd35m(leapalign(PREFERENCE), PREFERENCE)


def sd35m_refl_hpsv21() -> Run:
    """ReFL on SD3.5-M with HPSv2.1 on HPDv2 (App. B, Table 4)."""
    return sd35m(refl(), PREFERENCE)


def sd35m_draft_lv_hpsv21() -> Run:
    """DRaFT-LV on SD3.5-M with HPSv2.1 on HPDv2 (App. B, Table 4).

    On SD3's grid the last step is tiny (sigma_1 = 0.0089), so this method hardly trains.
    """
    return sd35m(draft_lv(), PREFERENCE)


def sd35m_drtune_hpsv21() -> Run:
    """DRTune on SD3.5-M with HPSv2.1 on HPDv2 (App. B, Table 4)."""
    return sd35m(drtune(), PREFERENCE)


_FUNCTIONS = (
    *(flux_leapalign_hpsv21, flux_refl_hpsv21, flux_draft_lv_hpsv21, flux_drtune_hpsv21),
    *(flux_leapalign_pickscore, flux_refl_pickscore, flux_draft_lv_pickscore, flux_drtune_pickscore),
    *(flux_leapalign_hpsv3_mjhq, flux_refl_hpsv3_mjhq, flux_draft_lv_hpsv3_mjhq, flux_drtune_hpsv3_mjhq),
    *(flux_leapalign_geneval, flux_refl_geneval, flux_draft_lv_geneval, flux_drtune_geneval),
    *(sd35m_leapalign_hpsv21, sd35m_refl_hpsv21, sd35m_draft_lv_hpsv21, sd35m_drtune_hpsv21),
)
PAPER: dict[str, Callable[[], Run]] = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS}

"""The study that compares methods. A study is a function that returns a `Study`; a user's own: my.py:mine.

`arena` compares methods before saturation: 120 updates of 16 samples, where 300 of 32 take every method to the reward's
ceiling. What differs between its runs is the method and what the search finds:

- clipping: at the median gradient norm of the last 50 updates (`clip_quantile` 0.5) and at no fixed norm. A fixed one
  clips half of LeapAlign's updates, whose loss carries a weight, and none of ReFL's;
- two draws of steps an update for every method that draws steps (`samples_per_draw` 8);
- no anchor to the base, except RSM, whose target it defines; groups of four for policy gradients;
- LeapAlign has the paper's settings, not those that ShapeWorld's recipe has been tuned to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from leapalign.methods.diffusion_nft import DiffusionNFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flow_grpo import FlowGRPO
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM
from leapalign.monitors import HeldOut, Monitors
from leapalign.prompts import ShapeWorldPrompts
from leapalign.recipes.shapeworld import shapeworld
from leapalign.recipes.shapeworld_policy_gradients import CLIP
from leapalign.rewards.clip import PickScore
from leapalign.run import Run
from leapalign.studies.arena.study import Axis, Contender, Judging, Search, Study

RATES = Axis(setting="learning_rate", values=(1e-4, 3e-4, 1e-3))
SEARCH_SEED, SEARCH_NOISE = 100, 1000


def arena() -> Study:
    """Eight methods, five seeds, 120 updates of 16 samples."""
    share = Axis(setting="method.nested_scale", values=(0.3, 0.6, 1.0), most=1.0)
    return Study(
        name="arena",
        out="runs/arena",
        reference="leapalign",
        contenders=(
            contender("leapalign", LeapAlign(), share),
            contender("refl", ReFL(), Axis(setting="method.early_stop", values=(0.25, 0.5, 0.75), most=1.0)),
            contender("draft-lv", DRaFTLV(), Axis(setting="method.num_copies", values=(1, 2, 4), least=1, most=8)),
            contender("drtune", DRTune(), _count("method.num_training_steps", 1, 2, 4)),
            contender("flowbp-sparse", FlowBPSparse(), _count("method.num_training_steps", 2, 3, 4)),
            contender("rsm", RSM(), Axis(setting="anchor_weight", values=(0.03, 0.12, 0.48), least=1e-4)),
            contender("flow-grpo", FlowGRPO(clip_range=CLIP), Axis(setting="method.noise_level", values=(0.35, 0.7))),
            contender("diffusion-nft", DiffusionNFT(), Axis(setting="method.beta", values=(0.5, 1.0, 2.0))),
        ),
        seeds=(0, 1, 2, 3, 4),
        judging=judging("test", 60, 0),
        search=Search(judging=judging("validation", 40, SEARCH_NOISE), seeds=(SEARCH_SEED,)),
    )


def arena_smoke() -> Study:
    """Two methods, two seeds, two updates of four samples, two images a task: shows that it runs, no effect."""
    small = {"steps": 2, "batch_size": 4, "samples_per_draw": 2, "num_sampling_steps": 3, "warmup_steps": 0}
    small |= {"micro_batch_size": 2, "checkpoint_every": 1, "evaluate_every": 2, "evaluation_size": 2}
    small |= {"monitors": Monitors(drift_samples=2), "self_checks": False}
    names = (("leapalign", LeapAlign()), ("refl", ReFL()))
    contenders = [contender(name, method) for name, method in names]
    tests, others = judging("test", 2, 0), judging("validation", 1, SEARCH_NOISE)
    return replace(
        arena(),
        name="arena-smoke",
        out="runs/arena-smoke",
        contenders=tuple(replace(c, run=replace(c.run, **small), grid=()) for c in contenders),
        seeds=(0, 1),
        judging=replace(tests, diversity_prompts=6, images_per_prompt=2),
        search=Search(judging=replace(others, diversity_prompts=6, images_per_prompt=2), seeds=(SEARCH_SEED,)),
        counted_updates=2,
    )


def contender(name: str, method: Any, *axes: Axis) -> Contender:
    """A method on the study's run, with the learning rate in its grid."""
    return Contender(name=name, run=_run(method), grid=(RATES, *axes))


def judging(split: Literal["validation", "test"], per_task: int, seed: int) -> Judging:
    """ShapeWorld's prompts, judged by the embedded judge."""
    held_out = HeldOut(reward=PickScore(path="embedded:judge"))
    return Judging(prompts=ShapeWorldPrompts(split=split, num=per_task), held_out=held_out, seed=seed)


def _run(method: Any) -> Run:
    groups = isinstance(method, (FlowGRPO, DiffusionNFT))
    return replace(
        shapeworld(method),
        steps=120,
        batch_size=16,
        micro_batch_size=8,
        samples_per_draw=8,
        samples_per_prompt=4 if groups else 1,
        warmup_steps=10,
        evaluation_size=64,  # curves of right images and rewards
        decay_steps=0,  # so that a longer run at equal compute begins as the shorter one
        max_grad_norm=0.0,
        clip_quantile=0.5,
        ema_decay=0.0 if isinstance(method, DiffusionNFT) else 0.97,  # DiffusionNFT has an average of its own
        anchor_weight=0.12 if isinstance(method, RSM) else 0.0,
        anchor_states="all",
        checkpoint_every=60,
        keep_checkpoints=1,
        device="cpu",
    )


def _count(setting: str, *values: float) -> Axis:
    return Axis(setting=setting, values=values, least=1, most=8)

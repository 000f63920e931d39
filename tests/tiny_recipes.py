"""A published recipe on tiny random folders of the same classes: paths and sizes are replaced, nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_pipelines
from leapalign.prompts import PromptFile
from leapalign.run import RewardTerm, Run
from tiny_checkpoints import write_tiny_hpsv2
from tiny_clip import write_tiny_clip
from tiny_qwen import write_tiny_hpsv3

PROMPTS = "a red circle\na blue square\ntwo green star\n"


def write_folders(folder: Path) -> Path:
    """flux/, sd3/, and each reward's weights in a folder of the reward's name."""
    tiny_pipelines.save(tiny_pipelines.flux_pipeline(), folder / "flux")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(), folder / "sd3")
    write_tiny_hpsv2(folder / "hpsv2")
    write_tiny_clip(folder / "pickscore")
    (folder / "hpsv3").mkdir()
    write_tiny_hpsv3(folder / "hpsv3")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def tiny(run: Run, folder: Path, out: Path) -> Run:
    """Two updates of four samples on 16 x 16 pixels. Thresholds, rates and methods stay the recipe's own."""
    return replace(
        run,
        model=replace(run.model, path=str(folder / run.model.name), height=16, width=16, max_sequence_length=8),
        rewards=tuple(_tiny_term(term, folder) for term in run.rewards),
        prompts=PromptFile(path=str(folder / "prompts.txt")),
        out=str(out),
        steps=2,
        batch_size=4,
        micro_batch_size=2,
        num_sampling_steps=5,
        evaluation_size=2,
        device="cpu",
    )


def _tiny_term(term: RewardTerm, folder: Path) -> RewardTerm:
    reward: Any = term.reward
    path = str(folder / reward.name)
    return replace(term, reward=replace(reward, path=path, processor=path))

"""Build the run's model, components and rewards on the meta device, and count their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.distributed.fsdp_frozen import blocks_of
from leapalign.errors import UserError
from leapalign.models.base import Family
from leapalign.models.pipeline import PipelineModel
from leapalign.planning.meta_models import build_component, fake, fake_mode, load_weightless, twin
from leapalign.planning.rewards import RewardPlan, plan_reward
from leapalign.planning.sharding import ALONE, Rank
from leapalign.planning.sources import Source
from leapalign.run import Run
from leapalign.storage.pipeline_folder import INDEX, TRANSFORMER, PipelineFolder
from leapalign.tuning.base import QuantisesBase


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The run's model, components and rewards as meta-device models, and their sizes."""

    run: Run
    model: PipelineModel
    folder: PipelineFolder
    source: Source
    family: Family
    rewards: list[RewardPlan]
    held_out: list[RewardPlan]
    mode: FakeTensorMode
    weights: dict[str, int]  # component of the pipeline -> number of weights
    text_blocks: dict[str, int]  # text encoder -> number of weights in blocks that shard_text_encoders shards
    rank: Rank = ALONE
    device: str = "cpu"  # cpu, cuda, cuda:1, ...

    @property
    def trained(self) -> int:
        """Number of trained weights of the policy."""
        return sum(p.numel() for p in self.model.policy.parameters() if p.requires_grad)

    @property
    def branches(self) -> int:
        """Forwards of the policy per velocity call: 2 with guidance, else 1."""
        return 2 if self.model.guidance.active else 1


def family_of(run: Run) -> Family:
    """Return the run's model configuration. Raises UserError if it is not a family of diffusers pipelines."""
    if not isinstance(run.model, Family):
        raise UserError(
            f"--dry-run plans diffusers pipelines; {type(run.model).__name__} is not a leapalign.models.base.Family"
        )
    return run.model


def plan_components(run: Run, source: Source) -> Planned:
    """Build all models of the run on the meta device. Raises UserError with the first problem found."""
    family, path = family_of(run), source.folder
    _check_index(path)
    weights: dict[str, int] = {}

    def build(folder: PipelineFolder, name: str, dtype: torch.dtype | None = None) -> Any:
        component = build_component(folder, name, dtype)
        if isinstance(component, nn.Module):
            weights[name] = numbers_in(component)
        return component

    # quantisation happens while weights are read: build the base unquantised, memory.py counts quantised bytes
    tuning = replace(run.tuning, quantization="none") if quantization_of(run) else run.tuning
    model = load_weightless(replace(family, path=str(path)), run.dtype, tuning, build)
    if not isinstance(model, PipelineModel):
        raise UserError(f"--dry-run plans diffusers pipelines; {type(run.model).__name__} loads none")
    folder = model.folder
    if not source.hub_id:
        _check_weights(folder)
    text = {name: build(folder, name) for name in folder.components if name.startswith("text_encoder")}
    text_blocks = {}
    if run.shard_text_encoders:
        what = "shard_text_encoders: "
        text_blocks = {
            n: sum(map(numbers_in, blocks_of(component, what + n))) for n, component in text.items() if component
        }
    mode = fake_mode()
    fake(model.policy, mode)
    fake(model.decoder.vae, mode)
    model.decoder = replace(model.decoder, scale=twin(model.decoder.scale, mode), shift=twin(model.decoder.shift, mode))
    model.device = "cpu"
    rewards = [plan_reward(term, run.dtype, mode) for term in run.rewards]
    held_out = [plan_reward(term, run.dtype, mode) for term in run.monitors.held_out]
    return Planned(
        run=run,
        model=model,
        folder=folder,
        source=source,
        family=family,
        rewards=rewards,
        held_out=held_out,
        mode=mode,
        weights=weights,
        text_blocks=text_blocks,
    )


def _check_index(path: Path) -> None:
    if not (path / INDEX).is_file():
        raise UserError(f"{path} is not a diffusers pipeline folder: it has no {INDEX}")


def _check_weights(folder: PipelineFolder) -> None:
    for name in folder.components:
        place = folder.path / name
        elsewhere = name == TRANSFORMER and folder.transformer_file
        if name.startswith(("text_encoder", TRANSFORMER, "vae")) and not (
            elsewhere or any(place.glob("*.safetensors"))
        ):
            raise UserError(f"{place} has no safetensors file; copy the folder completely")


def quantization_of(run: Run) -> str:
    """Return how the run quantises its base; empty if it does not."""
    tuning = run.tuning
    return tuning.quantization if isinstance(tuning, QuantisesBase) and tuning.quantization != "none" else ""


def numbers_in(module: nn.Module) -> int:
    """Count the numbers in a module's file: weights (tied ones once) and saved buffers (SD3's position table)."""
    saved = module.state_dict().keys()
    buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
    return sum(tensor.numel() for tensor in (*module.parameters(), *buffers))

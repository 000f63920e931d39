"""Plan a run: geometry, memory by component and phase, downloads, prompts, disk. Raises UserError if it cannot start.

Models are built on the meta device, from a local folder's configurations or from those that ship with leapalign.
Memory counts tensors; the allocator's rounding and scratch memory inside one operator come on top (docs/planning.md).
Only the run's own setting of the graph is measured; settings that save less are measured if the run does not fit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leapalign.distributed.fsdp_frozen import check_names
from leapalign.errors import UserError
from leapalign.flow.graph import CheckpointsBlocks
from leapalign.models.base import Conditioning
from leapalign.models.pipeline import parse_dtype
from leapalign.models.prompt_embeds.location import cache_plan, limit
from leapalign.models.prompt_embeds.store import WORTHWHILE
from leapalign.planning.activations import GRAPHS, GraphBytes, forward_bytes, graph_bytes
from leapalign.planning.components import Planned, family_of, plan_components, quantization_of
from leapalign.planning.downloads import Download, hub_file, pipeline_components
from leapalign.planning.forwards import Forwards, count_forwards
from leapalign.planning.memory import (
    always,
    base_in_forward,
    phases,
    policy_bytes,
    reference_bytes,
    reward_bytes,
    trained_bytes,
    waiting_bytes,
)
from leapalign.planning.prompts import PlannedPrompts, plan_prompts, planned_shape
from leapalign.planning.sharding import first_rank
from leapalign.planning.sources import locate
from leapalign.run import Run
from leapalign.storage.lock import is_empty
from leapalign.storage.pipeline_folder import quantised_by
from leapalign.tuning.files import FILE as ADAPTER_FILE
from leapalign.tuning.full import QUANTISED, FullFineTuning
from leapalign.tuning.lora import LoRA
from leapalign.tuning.quantization import refuse_twice
from leapalign.tuning.start import on_hub


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's plan: sizes in bytes; counts per update unless a name says otherwise; of rank 0 if there are several."""

    name: str
    device: str
    geometry: dict[str, int | float]
    parameters: dict[str, int]  # component -> number of weights; "trained": number of trained weights
    memory: dict[str, int]  # component -> bytes on the device, from the first update on
    graphs: dict[str, GraphBytes]  # setting of the graph -> bytes of one micro-batch; the run's own first
    graph: str  # the run's setting
    phases: dict[str, int]  # phase -> peak bytes on the device
    prompts: dict[str, int]  # number; bytes of one's embeds; bytes of all; limit of the disk cache (0: memory only)
    downloads: tuple[Download, ...]
    disk: dict[str, int]
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def to_download(self) -> int:
        return sum(each.bytes for each in self.downloads if not each.cached)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak, "to_download": self.to_download}


def make_plan(run: Run, ranks: int = 1, ranks_per_machine: int = 8) -> Plan:
    """Plan a run on this number of ranks, as rank 0 sees it. Raises UserError with the first problem found."""
    from leapalign.training.engine import reward_names
    from leapalign.training.refusals import check_method, refuse_sharded_base

    check_method(run)
    check_names(run, reward_names(run))
    _check_out(Path(run.out))
    device, notes = planned_device(run.device)
    forwards = count_forwards(run)
    prompts = plan_prompts(run)
    family = family_of(run)
    with locate(family.path, family.published) as source:
        planned = plan_components(run, source)
        quantised, memory = bool(quantization_of(run)), _capacity(device)
        rank, said = first_rank(run, planned.model.policy, quantised, device, memory, ranks, ranks_per_machine)
        refuse_sharded_base(run, rank.sharded)
        planned = replace(planned, rank=rank, device=device)
        return _assemble(planned, device, forwards, prompts, [*notes, *prompts.notes, *said])


def _check_out(out: Path) -> None:
    if not is_empty(out):
        raise UserError(f"{out}: this folder is not empty; use `leapalign resume {out}`, or another --out")


def planned_device(name: str) -> tuple[str, list[str]]:
    """Return the device to plan for, and notes. Allows cuda on a machine without GPU. Raises UserError if unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        return name, ["no CUDA device here: the numbers are for another machine"]
    return name, []


# Assembling the plan


def _assemble(planned: Planned, device: str, forwards: Forwards, prompts: PlannedPrompts, notes: list[str]) -> Plan:
    run, model, dtype = planned.run, planned.model, parse_dtype(planned.run.dtype)
    shape, said = planned_shape(planned, prompts)
    notes = [*notes, *said]
    negative = shape.empty(1, dtype, planned.mode) if model.guidance.active else None
    conditioning = Conditioning(shape.empty(run.micro_batch_size, dtype, planned.mode), negative)
    forward = forward_bytes(run, model, conditioning, planned.mode)
    reward, waits = reward_bytes(planned, forwards), run.waits_for_mean(planned.rank.world.size)

    def with_graph(graph: str) -> tuple[GraphBytes, dict[str, int]]:
        found = graph_bytes(run, model, conditioning, planned.mode, graph, forwards.seed, waits)
        waiting = waiting_bytes(planned, forwards, found)
        return found, phases(planned, graph=found, forward=forward, reward=reward, waiting=waiting)

    graph, in_phases = with_graph(run.graph)
    each = shape.bytes(dtype)
    plan = Plan(
        name=run.name,
        device=device,
        geometry=_geometry(planned, forwards),
        parameters={**planned.weights, "trained": planned.trained},
        memory=always(planned),
        graphs={run.graph: graph},
        graph=run.graph,
        phases=in_phases,
        prompts={
            "number": prompts.number,
            "bytes_each": each,
            "bytes": prompts.number * each,
            "limit": _cache_limit(planned),
        },
        downloads=_downloads(planned, prompts),
        disk=_disk(planned),
        notes=(),
    )
    if not _fits(plan.peak, device):
        others = {graph: with_graph(graph) for graph in _smaller_graphs(plan, model.policy)}
        notes = [*notes, _advice(plan, {graph: max(phases.values()) for graph, (_, phases) in others.items()})]
        plan = replace(plan, graphs=plan.graphs | {graph: found for graph, (found, _) in others.items()})
    return replace(plan, notes=(*notes, *_traffic(planned, forwards), *_notes(planned, plan)))


def _traffic(planned: Planned, forwards: Forwards) -> list[str]:
    """Note the bytes that a rank of a sharded policy receives per update: each forward and backward gathers weights."""
    run, rank = planned.run, planned.rank
    if not rank.sharded or run.gather_in_rollout:
        return []
    micros = run.batch_size // (run.micro_batch_size * rank.world.size) * planned.branches // forwards.updates
    more, apart = forwards.of_anchor(run.anchor_states) if run.anchored else (0, 0)
    backwards = micros * (forwards.most_with_graph + apart)
    kept = forwards.most_with_graph - forwards.in_backward
    inputs = run.graph == "inputs" or run.waits_for_mean(rank.world.size)
    again = micros * kept if inputs else 0  # the forward is run again before its backward
    gathers = round(micros * (forwards.mean + more)) + backwards + again
    received = rank.received(planned.model.policy, gathers, backwards)
    way_out = "" if rank.rounded or run.dtype == "float32" else "; --gather-dtype bfloat16 halves the gathers"
    return [f"each rank receives about {_gb(received)} GB an update, in {gathers} gathers of the weights{way_out}"]


def _fits(peak: int, device: str) -> bool:
    """Return True if the peak fits the device, or if the device's memory is unknown."""
    return not 0 < _capacity(device) < peak


def _smaller_graphs(plan: Plan, policy: Any) -> Sequence[str]:
    """Settings of the graph that save less than the run's own; none if a phase does not fit even without a graph."""
    graph = plan.graphs[plan.graph]
    besides = {"rollout": graph.rollout, "decode and reward": graph.kept, "backward": graph.backward}
    if not all(_fits(size - besides.get(phase, 0), plan.device) for phase, size in plan.phases.items()):
        return ()
    smaller = GRAPHS[GRAPHS.index(plan.graph) + 1 :]
    return [graph for graph in smaller if graph != "blocks" or isinstance(policy, CheckpointsBlocks)]


def _advice(plan: Plan, peaks: dict[str, int]) -> str:
    """Advise on a peak that does not fit. `peaks`: other setting of the graph -> peak bytes of the run with it."""
    found = f"the peak does not fit: {plan.device} has {_gb(_capacity(plan.device))} GB"
    less = {graph: peak for graph, peak in peaks.items() if peak < plan.peak}
    if less:
        return found + "".join(f"; graph {graph} would need {_gb(peak)} GB" for graph, peak in less.items())
    return found + "; see tuning (LoRA, quantization), micro_batch_size, reward_chunk, and the size of the images"


def _geometry(planned: Planned, forwards: Forwards) -> dict[str, int | float]:
    run, rank, branches = planned.run, planned.rank, planned.branches
    accumulations = run.batch_size // (run.micro_batch_size * rank.world.size)
    anchor, _ = forwards.of_anchor(run.anchor_states) if run.anchored else (0, 0)
    anchor += forwards.of_mean(run.graph) if run.waits_for_mean(rank.world.size) else 0
    several = {"ranks": rank.world.size, "ranks_that_share_the_weights": rank.among if rank.sharded else 1}
    return (several if rank.world.size > 1 else {}) | {
        "steps": run.steps,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "accumulations": accumulations,
        **({"samples_per_prompt": run.samples_per_prompt} if run.samples_per_prompt > 1 else {}),
        "samples_per_draw": run.samples_per_draw or run.batch_size,
        "sampling_steps": run.num_sampling_steps,
        "branches": branches,
        "forwards": round(accumulations * (forwards.mean + anchor) * branches / forwards.updates, 1),
        "forwards_with_graph_at_most": accumulations * forwards.most_with_graph * branches // forwards.updates,
        "images_scored": run.batch_size * forwards.copies // forwards.updates,
    }


def _downloads(planned: Planned, prompts: PlannedPrompts) -> tuple[Download, ...]:
    rewards = [d for reward in (*planned.rewards, *planned.held_out) for d in reward.downloads]
    return (*_model_downloads(planned), *_start_downloads(planned), *rewards, *prompts.downloads)


def _start_downloads(planned: Planned) -> list[Download]:
    """Describe the adapter that a LoRA begins with, if it is on the hub; its file is about as large as the run's."""
    tuning = planned.run.tuning
    if not isinstance(tuning, LoRA) or not tuning.start or not on_hub(tuning.start):
        return []
    return [hub_file(tuning.start, ADAPTER_FILE, trained_bytes(planned))]


def _model_downloads(planned: Planned) -> list[Download]:
    if not planned.source.hub_id:
        return []
    sizes = {name: count * planned.source.bytes_per_weight for name, count in planned.weights.items()}
    return pipeline_components(planned.source.hub_id, sizes)


def _disk(planned: Planned) -> dict[str, int]:
    """Output -> bytes on disk. A checkpoint holds weights, average and two moments; one more exists during a save."""
    run, trained = planned.run, trained_bytes(planned)
    best = trained if run.stop_when.evaluations else 0  # one more average for each checkpoint, and one beside
    others = sum(count for name, count in planned.weights.items() if name != "transformer")
    per_weight = planned.source.bytes_per_weight
    whole = run.tuning.output == "pipeline"
    return {
        "checkpoints": (4 * trained + best) * (run.keep_checkpoints + 1),
        "tuned model": policy_bytes(planned) + others * per_weight if whole else trained,
    }


def _check_base(planned: Planned) -> list[str]:
    """Note that the base's folder is quantised. Raises UserError if the run would train or requantise its weights."""
    method = quantised_by(planned.folder)
    refuse_twice(planned.folder, quantization_of(planned.run) or "none")
    if method and isinstance(planned.run.tuning, FullFineTuning):
        raise UserError(f"{planned.folder.path} ({method}): {QUANTISED}")
    return [f"the base is quantised already (by {method}): its memory is planned as if it were not"] if method else []


def _notes(planned: Planned, plan: Plan) -> list[str]:
    rewards = [*planned.rewards, *planned.held_out]
    found = _check_base(planned) + [f"{reward.name}: {reward.note}" for reward in rewards if reward.note]
    if base := base_in_forward(planned):
        held, shown = reference_bytes(planned), f"{_gb(base)} GB of it at a time on {planned.device}"
        found.append(f"the base's weights take {_gb(held)} GB of CPU memory, and {shown}")
    path, known = planned.source.hub_id, planned.source.facts
    if known and known.unchecked and planned.source.shipped:
        found.append(f"sizes of {path} are approximate: those that ship were not compared with its published files")
    if known and known.gated and any(not d.cached for d in plan.downloads if d.repo == path):
        found.append(f"{path} is gated ({known.licence}): accept it on its page, then `hf auth login`")
    if plan.prompts["limit"]:
        found += filter(None, [cache_plan(plan.prompts["number"], plan.prompts["bytes_each"]).problem])
    elif plan.prompts["bytes"] > (memory := _capacity("cpu")) > 0:
        found.append(f"the encoded prompts are more than this machine's {_gb(memory)} GB of memory")
    free = shutil.disk_usage(_existing(Path(planned.run.out))).free
    if sum(plan.disk.values()) > free:
        found.append(f"{planned.run.out}: {_gb(free)} GB are free there, less than the run may write")
    return found


def _cache_limit(planned: Planned) -> int:
    """Limit of the prompt cache on disk in bytes (LEAPALIGN_CACHE_GB); 0 if prompt embeds stay in memory only."""
    text = sum(count for name, count in planned.weights.items() if name.startswith("text_encoder"))
    per_weight = planned.source.bytes_per_weight
    return limit() if text * per_weight >= WORTHWHILE else 0


def _capacity(device: str) -> int:
    """Bytes of the device's memory; 0 if unknown."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_properties(kind).total_memory if torch.cuda.is_available() else 0
    if kind.type != "cpu" or os.name == "nt" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that is an existing folder."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"

"""A run's plan: geometry, memory by part and phase, downloads, prompts, disk; or the first thing that is wrong with it.

Everything is built on the meta device from configurations: a local folder's own, or the numbers that ship. Memory is
what tensors take; an allocator's rounding, and scratch memory inside one operator, come on top (docs/planning.md).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.errors import UserError
from leapalign.models.base import Conditioning
from leapalign.models.folder import INDEX, PipelineFolder, open_folder
from leapalign.models.pipeline import PipelineModel, parse_dtype
from leapalign.models.prompt_place import cache_plan, limit
from leapalign.models.prompt_store import WORTHWHILE
from leapalign.planning import texts
from leapalign.planning.activations import GRAPHS, Forwards, GraphBytes, count_forwards, graph_bytes, latent_bytes
from leapalign.planning.architectures import Pipeline
from leapalign.planning.downloads import Download, hub_file, pipeline_parts
from leapalign.planning.rewards import RewardPlan, plan_reward
from leapalign.planning.weightless import build_part, fake, fake_mode, folder_of, load_weightless
from leapalign.run import Run

FLOAT32 = 4  # bytes
LINEAR_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # a weight of a quantised layer; nf4: and a float32 for every 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All sizes in bytes, all counts of one update unless a name says otherwise."""

    name: str
    device: str
    geometry: dict[str, int | float]
    parameters: dict[str, int]  # part -> weights; "trained" among them
    memory: dict[str, int]  # part -> bytes on the device, from the first update on
    graphs: dict[str, GraphBytes]  # setting of the graph -> what one micro-batch needs
    graph: str  # the run's setting
    phases: dict[str, int]  # phase -> most bytes on the device
    prompts: dict[str, int]  # number, bytes of each in the cache, bytes of all, limit of the disk's (0: memory only)
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


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the plan is made of, without weights."""

    run: Run
    model: PipelineModel
    folder: PipelineFolder
    known: Pipeline | None
    kind: str
    rewards: list[RewardPlan]
    mode: FakeTensorMode
    weights: dict[str, int]  # part of the pipeline -> how many


def make_plan(run: Run) -> Plan:
    """UserError with the first thing that would stop the run."""
    from leapalign.training.loop import _refuse_without_gradient

    _refuse_without_gradient(run)
    _check_out(Path(run.out))
    device, notes = planned_device(run.device)
    forwards = count_forwards(run)
    prompts, prompt_downloads, prompt_notes = plan_prompts(run)
    with folder_of(_path_of(run)) as (folder, known):
        parts = _parts(run, folder, known)
        return _assemble(parts, device, forwards, prompts, prompt_downloads, [*notes, *prompt_notes])


def _path_of(run: Run) -> str:
    path = getattr(run.model, "path", None)
    if not isinstance(path, str):
        raise UserError(f"--dry-run plans diffusers pipelines; {type(run.model).__name__} has no path of one")
    return path


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: this folder is not empty; use `leapalign resume {out}`, or another --out")


def planned_device(name: str) -> tuple[str, list[str]]:
    """The device that the numbers are for. A GPU may be planned where there is none; other names are mistakes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        return name, ["there is no CUDA device here: the numbers are for one elsewhere"]
    return name, []


def plan_prompts(run: Run) -> tuple[int, list[Download], list[str]]:
    """How many are encoded, and what must be fetched first. UserError for a file that cannot be read."""
    from leapalign.training.batches import prompts_used

    source = getattr(run.prompts, "source", None)
    download = hub_file(source.repo, source.file, source.bytes, "dataset") if source else None
    if download and not download.cached and not run.prompts.path:
        most = run.steps * run.batch_size + run.probe_size
        return most, [download], ["the prompts are not here yet: their number is the most that the run can reach"]
    return len(prompts_used(run, run.prompts.load())), [download] if download and not run.prompts.path else [], []


def _parts(run: Run, path: Path, known: Pipeline | None) -> Parts:
    kind = _pipeline_class(path)
    folder = open_folder(str(path), kind, ())
    if known is None:
        _check_weights(folder)
    # the base is quantised while it is read: planned as bfloat16, and its bytes counted below
    tuning = replace(run.tuning, quantization="none") if _quantization(run) else run.tuning
    model = load_weightless(replace(run.model, path=str(path)), run.dtype, tuning)
    if not isinstance(model, PipelineModel):
        raise UserError(f"--dry-run plans diffusers pipelines; {type(run.model).__name__} loads none")
    mode = fake_mode()
    fake(model.policy, mode)
    fake(model.decoder.vae, mode)
    model.device = "cpu"
    rewards = [plan_reward(term, run.dtype, mode) for term in run.rewards]
    weights = {
        name: numbers_in(part) for name in folder.parts if isinstance(part := _model_part(folder, name), nn.Module)
    }
    return Parts(
        run=run, model=model, folder=folder, known=known, kind=kind, rewards=rewards, mode=mode, weights=weights
    )


def _pipeline_class(path: Path) -> str:
    from leapalign.models.folder import read_json

    if not (path / INDEX).is_file():
        raise UserError(f"{path} is not a diffusers pipeline folder: it has no {INDEX}")
    return str(read_json(path / INDEX).get("_class_name"))


def _model_part(folder: PipelineFolder, name: str) -> Any:
    """A part that has weights, on the meta device; None for tokenizers and schedulers."""
    return build_part(folder, name) if name.startswith(("text_encoder", "transformer", "vae")) else None


def _check_weights(folder: PipelineFolder) -> None:
    for name in folder.parts:
        place = folder.path / name
        if name.startswith(("text_encoder", "transformer", "vae")) and not any(place.glob("*.safetensors")):
            raise UserError(f"{place} has no safetensors; copy the folder completely")


def _quantization(run: Run) -> str:
    kind = getattr(run.tuning, "quantization", "none")
    return "" if kind == "none" else kind


def numbers_in(module: nn.Module) -> int:
    """What its file holds: weights, tied ones once, and saved buffers (SD3's table of positions)."""
    saved = module.state_dict().keys()
    buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
    return sum(tensor.numel() for tensor in (*module.parameters(), *buffers))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Putting it together


def _assemble(
    parts: Parts, device: str, forwards: Forwards, prompts: int, prompt_downloads: list[Download], notes: list[str]
) -> Plan:
    run, model, dtype = parts.run, parts.model, parse_dtype(parts.run.dtype)
    shape = texts.text_shape(run.model, parts.folder, parts.kind, model.policy)
    with parts.mode:
        negative = shape.empty(1, dtype) if model.guidance.active else None
        conditioning = Conditioning(shape.empty(run.micro_batch_size, dtype), negative)
    graphs = {
        graph: graph_bytes(run, model, conditioning, parts.mode, graph, forwards.seed)
        for graph in GRAPHS
        if graph != "blocks" or hasattr(model.policy, "enable_gradient_checkpointing")
    }
    branches = 2 if negative is not None else 1
    trained = _bytes(p for p in model.policy.parameters() if p.requires_grad)
    memory = _memory(parts, trained)
    phases = _phases(parts, device, forwards, branches, graphs, memory, trained)
    each = shape.bytes(dtype)
    cache = {"number": prompts, "bytes_each": each, "bytes": prompts * each, "limit": _cache_limit(parts)}
    plan = Plan(
        name=run.name,
        device=device,
        geometry=_geometry(run, forwards, branches),
        parameters={**parts.weights, "trained": _trained(model.policy)},
        memory=memory,
        graphs=graphs,
        graph=run.graph,
        phases=phases,
        prompts=cache,
        downloads=(*_model_downloads(parts), *(d for r in parts.rewards for d in r.downloads), *prompt_downloads),
        disk=_disk(parts, trained),
        notes=(),
    )
    return replace(plan, notes=(*notes, *_notes(parts, plan)))


def _trained(policy: nn.Module) -> int:
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


def _geometry(run: Run, forwards: Forwards, branches: int) -> dict[str, int | float]:
    accumulations = run.batch_size // run.micro_batch_size
    return {
        "steps": run.steps,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "accumulations": accumulations,
        "samples_per_draw": run.samples_per_draw or run.batch_size,
        "sampling_steps": run.num_sampling_steps,
        "branches": branches,
        "forwards": round(accumulations * forwards.mean * branches, 1),
        "forwards_with_graph_at_most": accumulations * forwards.most_with_graph * branches,
        "images_scored": run.batch_size * forwards.copies,
    }


def _memory(parts: Parts, trained: int) -> dict[str, int]:
    """What lies on the device from the first update on, whatever the phase."""
    policy = parts.model.policy
    here = [r.bytes for r, term in zip(parts.rewards, parts.run.rewards) if not term.device]
    return {
        "transformer": _policy_bytes(parts),
        "optimiser (AdamW, two moments)": 2 * trained,
        "average (EMA, float32)": FLOAT32 * _trained(policy),
        "VAE (float32)": _bytes(parts.model.decoder.vae.parameters()),
        "rewards": sum(here),
    }


def _policy_bytes(parts: Parts) -> int:
    policy, quantization = parts.model.policy, _quantization(parts.run)
    total = _bytes([*policy.parameters(), *policy.buffers()])
    if not quantization:
        return total
    linear = [m.weight for m in policy.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    return total - _bytes(linear) + int(LINEAR_BYTES[quantization] * sum(w.numel() for w in linear))


def _phases(
    parts: Parts,
    device: str,
    forwards: Forwards,
    branches: int,
    graphs: dict[str, GraphBytes],
    memory: dict[str, int],
    trained: int,
) -> dict[str, int]:
    """Phase -> the most bytes alive in it."""
    run, graph, always = parts.run, graphs[parts.run.graph], sum(memory.values())
    accumulated = run.batch_size > run.micro_batch_size
    held = trained if accumulated else 0  # gradients of earlier micro-batches
    # a weight that is used several times in one graph has its gradients added up beside .grad (LOG.md)
    partial = trained if accumulated and forwards.most_with_graph * branches > 1 else 0
    rows = run.micro_batch_size * forwards.copies
    scores = [r.score for r, term in zip(parts.rewards, run.rewards) if r.score and not term.device]
    reward = latent_bytes(
        parts.model,
        parts.mode,
        min(run.reward_chunk or rows, rows),
        lambda images: [images, *(score(images) for score in scores)],
    )
    text = sum(count for name, count in parts.weights.items() if name.startswith("text_encoder"))
    foreach = trained if torch.device(device).type == "cuda" else 0  # AdamW's temporaries for all weights at once
    return {
        "encoding prompts": memory["transformer"] + memory["VAE (float32)"] + text * parse_dtype(run.dtype).itemsize,
        "rollout": always + held + graph.rollout,
        "decode and reward": always + held + graph.kept + reward,
        "backward": always + trained + partial + graph.backward,
        "optimiser step": always + trained + foreach,
        "scoring the average": always + trained + trained + graphs["inputs"].rollout,
    }


def _model_downloads(parts: Parts) -> list[Download]:
    if parts.known is None:
        return []
    sizes = {name: count * parts.known.bytes_per_weight for name, count in parts.weights.items()}
    return pipeline_parts(_path_of(parts.run), sizes)


def _disk(parts: Parts, trained: int) -> dict[str, int]:
    """Checkpoints hold weights, average and two moments; one more exists while it is written."""
    run = parts.run
    others = sum(count for name, count in parts.weights.items() if name != "transformer")
    per_weight = parts.known.bytes_per_weight if parts.known else FLOAT32
    whole = getattr(run.tuning, "output", "pipeline") == "pipeline"
    return {
        "checkpoints": 4 * trained * (run.keep_checkpoints + 1),
        "tuned model": _policy_bytes(parts) + others * per_weight if whole else trained,
    }


def _notes(parts: Parts, plan: Plan) -> list[str]:
    found = [f"{reward.name}: {reward.note}" for reward in parts.rewards if reward.note]
    path, known = _path_of(parts.run), parts.known
    if known and known.gated and any(not d.cached for d in plan.downloads if d.repo == path):
        found.append(f"{path} is gated ({known.licence}): accept it on its page, then `hf auth login`")
    if (there := _capacity(plan.device)) and plan.peak > there:
        found.append(f"the peak does not fit: {plan.device} has {_gb(there)} GB; see graph, tuning, micro_batch_size")
    if plan.prompts["limit"]:
        found += filter(None, [cache_plan(plan.prompts["number"], plan.prompts["bytes_each"]).problem])
    elif plan.prompts["bytes"] > (memory := _capacity("cpu")) > 0:
        found.append(f"the encoded prompts are more than this machine's {_gb(memory)} GB of memory")
    free = shutil.disk_usage(_existing(Path(parts.run.out))).free
    if sum(plan.disk.values()) > free:
        found.append(f"{parts.run.out}: {_gb(free)} GB are free there, less than the run may write")
    return found


def _cache_limit(parts: Parts) -> int:
    """Bytes that encoded prompts may take on disk (LEAPALIGN_CACHE_GB); 0 where they are kept in memory alone."""
    text = sum(count for name, count in parts.weights.items() if name.startswith("text_encoder"))
    per_weight = parts.known.bytes_per_weight if parts.known else FLOAT32
    return limit() if text * per_weight >= WORTHWHILE else 0


def _capacity(device: str) -> int:
    """Bytes of the device's memory; 0 where it is not known."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_properties(kind).total_memory if torch.cuda.is_available() else 0
    if kind.type != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"

"""Out of memory: what fills it, and the three settings that would help most, instead of an allocator's message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from leapalign.distributed.tensors import local
from leapalign.errors import RunStopped, UserError, is_out_of_memory
from leapalign.run import Run

ADVICE = 3  # settings named


@contextmanager
def explained(run: Run, where: str, plan: list[str], *, loading: bool = False) -> Iterator[None]:
    """Inside, too little memory stops the run with `where`, the plan's parts and advice (exit status 1).

    `plan`: lines, one a part with its size (`parts_in_memory`).
    """
    try:
        yield
    except (MemoryError, RuntimeError, UserError) as error:  # a UserError may hide it: "this folder cannot be opened"
        if (cause := _memory_error(error)) is None:
            raise
        raise RunStopped(message(run, where, cause, plan, loading=loading)) from error


def message(run: Run, where: str, error: BaseException, plan: list[str], *, loading: bool) -> str:
    """Everything that the user sees."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    parts = "".join(f"\n  {line}" for line in plan)
    held = f"\nIn memory for the whole run:{parts}" if plan else ""
    advice = "".join(f"\n  {i}. {text}" for i, text in enumerate(settings(run, loading=loading)[:ADVICE], 1))
    return (
        f"{where}: out of memory ({reason}){held}\nWhat would help most:{advice}\n"
        f"Give these to `leapalign train`; or, where a checkpoint has been saved, write them into {run.out}/run.json "
        f"and go on with `leapalign resume {run.out} --allow-changes`"
    )


def settings(run: Run, *, loading: bool) -> list[str]:
    """What this run can still change, the most helpful first: memory of the graph, or of what is loaded."""
    graph, loaded = _of_graph(run), _of_loaded(run)
    return loaded + graph if loading else graph + loaded


def _of_graph(run: Run) -> list[str]:
    texts = []
    if run.graph != "inputs":
        texts.append("--graph inputs: keep only the model's inputs and compute each differentiated step twice")
    if run.micro_batch_size > 1:
        smaller = max(m for m in range(1, run.micro_batch_size) if run.batch_size % m == 0)
        texts.append(f"--micro-batch-size {smaller}: fewer samples at a time, the same result")
    if run.reward_chunk != 1 and run.micro_batch_size > 1:
        texts.append("--reward-chunk 1: decode and score one sample at a time, the same result")
    if getattr(run.model, "decode_chunk", 1) != 1:
        texts.append("--model.decode-chunk 1: decode one picture at a time, the same result")
    if run.dtype == "float32":
        texts.append("--dtype bfloat16: half the memory of the forward passes (over float32 weights)")
    return texts


def _of_loaded(run: Run) -> list[str]:
    texts = []
    if getattr(run.tuning, "name", "") == "full":
        texts.append("a recipe that trains a LoRA instead of all weights: no gradient, optimiser and average of those")
    if any(not term.device for term in run.rewards):
        texts.append("--rewards.0.device cuda:1 (or cpu): the reward on another device than the model")
    if any((term.dtype or run.dtype) == "float32" for term in run.rewards):
        texts.append("--rewards.0.dtype bfloat16: half the memory of the reward's weights")
    height, width = getattr(run.model, "height", 0), getattr(run.model, "width", 0)
    if height and width:
        texts.append(f"--model.height and --model.width below {height} x {width}: smaller pictures")
    return [*texts, "a machine with more memory, or a smaller model"]


def parts_in_memory(
    parameters: Mapping[str, Tensor], shadow: Mapping[str, Tensor], policy: torch.nn.Module
) -> list[str]:
    """The sizes that are known once a run is loaded, largest first; forwards and rewards come on top."""
    trained = _bytes(parameters)
    frozen = _bytes({name: p for name, p in policy.named_parameters() if not p.requires_grad})
    sizes = {
        "optimiser (two moments)": 2 * trained,
        "trained weights": trained,
        "their gradients": trained,
        "their average (ema_decay)": _bytes(shadow),
        "frozen weights of the model": frozen,
    }
    return [f"{size / 2**30:8.2f} GiB  {name}" for name, size in sorted(sizes.items(), key=lambda p: -p[1]) if size]


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """On this rank: of sharded tensors, its part."""
    return sum(local(t).numel() * t.element_size() for t in tensors.values())


def _memory_error(error: BaseException | None) -> BaseException | None:
    """The error itself or the one behind it that says so."""
    while error is not None:
        if is_out_of_memory(error):
            return error
        error = error.__cause__
    return None

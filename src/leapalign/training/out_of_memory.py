"""Out-of-memory errors: sizes of the loaded components, and the three settings that would help most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.distributed.rank_rules import unequal_forwards
from leapalign.distributed.tensors import local
from leapalign.distributed.world import World
from leapalign.errors import RunStopped, UserError, is_out_of_memory
from leapalign.models.base import ImageSettings
from leapalign.run import Run

ADVICE = 3  # number of settings to suggest


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Facts besides the run's settings that decide which of them would help."""

    world: World
    sharded: bool = False  # the policy's weights are sharded over the ranks
    blocks: bool = False  # the policy can checkpoint its blocks
    held: tuple[str, ...] = ()  # one line per component in memory for the whole run, with its size
    loading: bool = False


@contextmanager
def explained(run: Run, where: str, setup: Setup) -> Iterator[None]:
    """Context that turns out-of-memory errors into RunStopped with `where`, the sizes of components, and advice."""
    try:
        yield
    except (MemoryError, RuntimeError, UserError) as error:  # a UserError may hide it: "this folder cannot be opened"
        if (cause := _memory_error(error)) is None:
            raise
        raise RunStopped(message(run, where, cause, setup)) from error


def message(run: Run, where: str, error: BaseException, setup: Setup) -> str:
    """Return the message for the user."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lines = "".join(f"\n  {line}" for line in setup.held)
    held = f"\nIn memory for the whole run:{lines}" if lines else ""
    advice = "".join(f"\n  {i}. {text}" for i, text in enumerate(settings(run, setup)[:ADVICE], 1))
    return (
        f"{where}: out of memory ({reason}){held}\nWhat would help most:{advice}\n"
        f"Give these to `leapalign train`; or, if a checkpoint has been saved, write them into {run.out}/run.json "
        f"and continue with `leapalign resume {run.out} --allow-changes`"
    )


def settings(run: Run, setup: Setup) -> list[str]:
    """List settings that this run can still change, most helpful first: sharding, graph, loaded components."""
    graph, loaded = _of_graph(run, setup), _of_loaded(run)
    return _of_sharding(run, setup) + (loaded + graph if setup.loading else graph + loaded)


def _of_sharding(run: Run, setup: Setup) -> list[str]:
    ranks = setup.world.size
    if setup.sharded and run.gather_in_rollout:
        return ["--no-gather-in-rollout: weights are gathered block by block, also between forwards without graph"]
    if ranks == 1 or setup.sharded:
        return []
    draws = f" --samples-per-draw {run.micro_batch_size * ranks}" if unequal_forwards(run, setup.world) else ""
    return [
        f"--sharding full{draws}: each of the {ranks} ranks keeps 1/{ranks} of weights, gradients, moments, average"
    ]


def _of_graph(run: Run, setup: Setup) -> list[str]:
    texts = []
    if run.graph == "all" and setup.blocks:
        texts.append("--graph blocks: keep only the inputs of the model's blocks and compute each block twice")
    elif run.graph != "inputs":
        again = "one forward more for each differentiated step" if setup.blocks else "each differentiated step twice"
        texts.append(f"--graph inputs: keep only the model's inputs, which computes {again}")
    if run.micro_batch_size > 1:
        smaller = max(m for m in range(1, run.micro_batch_size) if run.batch_size % m == 0)
        texts.append(f"--micro-batch-size {smaller}: fewer samples at a time, the same result")
    if run.reward_chunk != 1 and run.micro_batch_size > 1:
        texts.append("--reward-chunk 1: decode and score one sample at a time, the same result")
    if isinstance(run.model, ImageSettings) and run.model.decode_chunk != 1:
        texts.append("--model.decode-chunk 1: decode one image at a time, the same result")
    if run.dtype == "float32":
        texts.append("--dtype bfloat16: half the memory of the forward passes (over float32 weights)")
    return texts


def _of_loaded(run: Run) -> list[str]:
    texts = []
    if run.tuning.name == "full":
        texts.append("a recipe that trains a LoRA instead of all weights: no gradient, optimiser and average of those")
    if run.anchored and run.base_copy == "device":
        texts.append("--base-copy cpu: the base's weights in CPU memory, brought to the device block by block")
    if any(not term.device for term in run.rewards):
        texts.append("--rewards.0.device cuda:1 (or cpu): the reward on another device than the model")
    if any((term.dtype or run.dtype) == "float32" for term in run.rewards):
        texts.append("--rewards.0.dtype bfloat16: half the memory of the reward's weights")
    if isinstance(run.model, ImageSettings):
        size = f"{run.model.height} x {run.model.width}"
        texts.append(f"--model.height and --model.width below {size}: smaller images")
    return [*texts, "a machine with more memory, or a smaller model"]


def held_sizes(
    parameters: Mapping[str, Tensor], shadow: Mapping[str, Tensor], policy: torch.nn.Module
) -> tuple[str, ...]:
    """List the sizes of loaded components on this rank, largest first, without forwards and rewards."""
    trained = _bytes(parameters)
    frozen = _bytes({name: p for name, p in policy.named_parameters() if not p.requires_grad})
    sizes = {
        "optimiser (two moments)": 2 * trained,
        "trained weights": trained,
        "their gradients": trained,
        "their average (ema_decay)": _bytes(shadow),
        "frozen weights of the model": frozen,
    }
    largest_first = sorted(sizes.items(), key=lambda pair: -pair[1])
    return tuple(f"{size / 2**30:8.2f} GiB  {name}" for name, size in largest_first if size)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes on this rank; for sharded tensors, of its shard."""
    return sum(local(t).numel() * t.element_size() for t in tensors.values())


def _memory_error(error: BaseException | None) -> BaseException | None:
    """Return the first error in the chain of causes that reports too little memory."""
    while error is not None:
        if is_out_of_memory(error):
            return error
        error = error.__cause__
    return None

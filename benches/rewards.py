"""Published rewards at their full size: parameters, bytes, and what the score and gradient of one image cost.

    python benches/rewards.py                           # sizes alone: nothing is allocated (meta device)
    python benches/rewards.py --run hpsv2 > hpsv2.json  # time and memory of that one too, random weights in float32

No weights are read: sizes do not depend on them, nor do time and memory. `--run` scores one random image with one
random row of token ids, as long as the reward reads, and takes the gradient at the image. It counts
- `seconds`: of the score (text included, which is cached in a training for CLIPs) and of the gradient, after a warm-up;
- `cpu_seconds`: the same of the processor, all threads together: what stays the same beside other processes;
- `peak`: the most bytes alive among the tensors made in each phase, weights left out (see memory.py);
- `weights`: bytes of the weights and buffers;
- `resident`: the most memory that the process had, libraries and the making of random weights included (Linux, CPU).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from accelerate import init_empty_weights
from shared import facts, synchronized
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.planning.tensor_bytes import LiveBytes
from leapalign.rewards import BUILT_IN, Custom, ValueModel
from leapalign.rewards.base import Weightless
from leapalign.rewards.hpsv3.sizes import hpsv3


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Sizes of the published rewards, and the cost of one image, as JSON on stdout."""

    run: str = ""
    """Name of the reward to run, e.g. hpsv2; empty: sizes alone."""
    pixels: int = 512
    """Height and width of the image before the reward's own resize."""
    repeats: int = 1
    device: str = "cpu"
    most_bytes: int = 24 * 2**30
    """A reward whose weights need more than that in float32 is not run."""


PUBLISHED = {cls.name: cls().weightless() for cls in BUILT_IN if cls not in (Custom, ValueModel)}
ARCHITECTURES = {name: known for name, known in PUBLISHED.items() if known}
ARCHITECTURES |= {"hpsv3-cut": hpsv3(2, 2)}  # 2 of 28 and 2 of 32 layers


# Measuring

PHASES = ("score", "gradient")
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def empty(architecture: Weightless) -> Any:
    """The reward with weights that have shapes and no memory."""
    with init_empty_weights(include_buffers=False):
        return architecture.make()


def sizes(architecture: Weightless) -> dict[str, int]:
    parameters = sum(weight.numel() for weight in empty(architecture).model.parameters())
    return {"parameters": parameters, "bytes_float32": 4 * parameters, "bytes_bfloat16": 2 * parameters}


def randomised(architecture: Weightless, device: str) -> Any:
    """The reward with random weights of a usual size: transformers' own for BLIP are so small that they underflow."""
    reward = empty(architecture)
    model: nn.Module = reward.model
    weights = {
        key: 0.02 * torch.randn(weight.shape) + (weight.ndim == 1 and key.endswith("weight"))  # norms: about 1
        for key, weight in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval().to(device)
    return reward


def cost(architecture: Weightless, bench: Rewards) -> dict[str, Any]:
    """Seconds and bytes of the score and gradient of one image."""
    reward = randomised(architecture, bench.device)
    weights = (*reward.model.parameters(), *reward.model.buffers())
    images = torch.rand(1, 3, bench.pixels, bench.pixels, device=bench.device, requires_grad=True)
    with LiveBytes() as live:
        live.begin("score")
        score = architecture.score(reward, images)
        live.begin("gradient")
        (gradient,) = torch.autograd.grad(score.sum(), images)
        live.begin("end")
    if not (score.isfinite().all() and gradient.isfinite().all() and gradient.any()):
        raise RuntimeError("the random weights give no finite score and gradient: the numbers would mean nothing")
    peaks = live.peaks()
    times = [timed(architecture, reward, images) for _ in range(bench.repeats)]
    return {
        **{clock: {phase: min(each[clock][phase] for each in times) for phase in PHASES} for clock in CLOCKS},
        "peak": {phase: peaks[phase] for phase in PHASES},
        "weights": sum(weight.untyped_storage().nbytes() for weight in weights),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def timed(architecture: Weightless, reward: Any, images: Tensor) -> dict[str, dict[str, float]]:
    """clock -> phase -> seconds."""
    found: dict[str, Tensor] = {}

    def score() -> None:
        found["score"] = architecture.score(reward, images)

    readings = [{clock: read() for clock, read in CLOCKS.items()}]
    for action in (score, lambda: torch.autograd.grad(found["score"].sum(), images)):
        synchronized(action)()
        readings.append({clock: read() for clock, read in CLOCKS.items()})
    spans = {phase: (readings[i], readings[i + 1]) for i, phase in enumerate(PHASES)}
    return {clock: {phase: end[clock] - start[clock] for phase, (start, end) in spans.items()} for clock in CLOCKS}


def main(bench: Rewards) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {name: dict(sizes(each)) for name, each in ARCHITECTURES.items()}
    if bench.run:
        if bench.run not in table:
            raise UserError(f"--run {bench.run}: unknown; one of {', '.join(table)}")
        if (needed := table[bench.run]["bytes_float32"]) > bench.most_bytes:
            raise UserError(
                f"--run {bench.run}: its weights need {needed} bytes in float32, more than --most-bytes "
                f"{bench.most_bytes}; run it on a larger machine and raise the number"
            )
        table[bench.run]["one_image"] = cost(ARCHITECTURES[bench.run], bench)
    return {"rewards": table, **facts(bench)}


if __name__ == "__main__":
    try:
        print(json.dumps(main(tyro.cli(Rewards)), indent=2))
    except UserError as error:
        sys.exit(str(error))

"""What an update costs, in floating-point operations that torch's counter sees (matrix products, convolutions).

Counted are whole updates of the run itself: rollout, decode, reward, backward. Attention is computed by its plain
formula while counting, because the counter does not know the fused kernels of every device. Evaluations and checkpoints
are not counted: they are the same for every contender.

A method's draws differ in cost (ReFL and DRTune end their rollouts early), so the mean over several updates counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leapalign.codec import check_fields
from leapalign.run import Run
from leapalign.training.engine import build
from leapalign.training.update import update


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Means over `updates` updates; operations are of a whole update, not of a sample."""

    updates: int
    forwards: float  # of the generator, a sample
    generator_forward: float  # floating-point operations
    generator_backward: float
    scoring: float  # decodes and rewards, forward and backward

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def total(self) -> float:
        """Floating-point operations of an update."""
        return self.generator_forward + self.generator_backward + self.scoring

    @property
    def backwards(self) -> float:
        """Backwards of the generator, a sample: a backward of inputs and weights costs two forwards."""
        return self.forwards * self.generator_backward / (2 * self.generator_forward) if self.generator_forward else 0.0


def measure(run: Run, updates: int) -> Cost:
    """Take `updates` updates of the run (or as many more as whole rollouts need) and count; nothing is written."""
    uses = run.updates_per_rollout
    updates = -(-updates // uses) * uses
    engine = build(run)
    policy: Any = engine.model.policy
    rows, begun, forward = 0, [0], 0
    counter = FlopCounterMode(display=False)

    def before(module: object, inputs: object) -> None:
        begun[0] = counter.get_total_flops()

    def after(module: object, inputs: object, output: Any) -> None:
        nonlocal rows, forward
        forward += counter.get_total_flops() - begun[0]
        rows += len(output if isinstance(output, torch.Tensor) else output[0])

    handles = [policy.register_forward_pre_hook(before), policy.register_forward_hook(after)]
    with counter, sdpa_kernel(SDPBackend.MATH):
        for step in range(updates):
            update(engine, step)
    for handle in handles:
        handle.remove()
    of_generator = sum(counter.get_flop_counts().get(type(policy).__name__, {}).values())
    return Cost(
        updates=updates,
        forwards=rows / (updates * run.batch_size),
        generator_forward=forward / updates,
        generator_backward=(of_generator - forward) / updates,
        scoring=(counter.get_total_flops() - of_generator) / updates,
    )


def equal_compute(steps: int, reference: Cost, own: Cost, uses: int = 1, tolerance: float = 0.02) -> int:
    """Return the number of updates whose operations equal `steps` updates of the reference.

    It is `steps` itself within the tolerance, so that one run serves both comparisons; else a multiple of `uses`, the
    updates on one rollout.
    """
    exact = steps * reference.total / own.total
    if abs(exact - steps) <= tolerance * steps:
        return steps
    return max(1, round(exact / uses)) * uses

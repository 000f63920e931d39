"""What an update costs, in floating-point operations that torch's counter sees (matrix products, convolutions).

Counted are whole updates of the run itself: rollout, decode, reward, backward. Attention is computed by its plain
formula while counting, because the counter does not know the fused kernels of every device. Evaluations and checkpoints
are not counted: they are the same for every contender.

A method's draws differ in cost (ReFL and DRTune end their rollouts early), so the mean over several updates counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leapalign.codec import check_fields
from leapalign.run import Run
from leapalign.training.engine import build
from leapalign.training.update import update

if TYPE_CHECKING:
    from leapalign.models.base import Model


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
    engine, counter = build(run), FlopCounterMode(display=False)
    marks = _Marks(counter)
    engine = replace(engine, model=cast("Any", _Marked(engine.model, marks)))
    policy = engine.model.policy
    handles = [policy.register_forward_pre_hook(marks.forward), policy.register_forward_hook(marks.forwarded)]
    with counter, sdpa_kernel(SDPBackend.MATH):
        for step in range(updates):
            update(engine, step)
            marks.scored()
    for handle in handles:
        handle.remove()
    return Cost(
        updates=updates,
        forwards=marks.rows / (updates * run.batch_size),
        generator_forward=marks.in_forwards / updates,
        generator_backward=(counter.get_total_flops() - marks.in_forwards - marks.in_scoring) / updates,
        scoring=marks.in_scoring / updates,
    )


class _Marks:
    """Divides the operations: forwards of the generator, scoring, and the rest, which is its backward.

    Scoring begins with a decode. It ends when the latents have their gradient or, without gradient, at the generator's
    next forward.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.rows, self.in_forwards, self.in_scoring = 0, 0, 0
        self.begun = 0  # operations before the forward that runs
        self.from_decode: int | None = None  # operations before the scoring that runs; None: none does
        self.differentiated = False

    def decode(self, latents: Tensor) -> None:
        self.from_decode, self.differentiated = self.counter.get_total_flops(), latents.requires_grad
        if latents.requires_grad:
            latents.register_hook(self.gradient)

    def gradient(self, grad: Tensor) -> None:
        now = self.counter.get_total_flops()
        self.in_scoring += now - (now if self.from_decode is None else self.from_decode)
        self.from_decode = now  # a second reward's gradient may follow

    def scored(self) -> None:
        if self.from_decode is not None and not self.differentiated:
            self.in_scoring += self.counter.get_total_flops() - self.from_decode
        self.from_decode = None

    def forward(self, module: object, inputs: object) -> None:
        self.scored()
        self.begun = self.counter.get_total_flops()

    def forwarded(self, module: object, inputs: object, output: Any) -> None:
        self.in_forwards += self.counter.get_total_flops() - self.begun
        self.rows += len(output if isinstance(output, Tensor) else output[0])


class _Marked:
    """A model whose decodes are marked."""

    def __init__(self, model: Model, marks: _Marks) -> None:
        self._model, self._marks = model, marks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, latents: Tensor) -> Tensor:
        self._marks.decode(latents)
        return self._model.decode(latents)


def equal_compute(steps: int, reference: Cost, own: Cost, uses: int = 1, tolerance: float = 0.02) -> int:
    """Return the number of updates whose operations equal `steps` updates of the reference.

    It is `steps` itself within the tolerance, so that one run serves both comparisons; else a multiple of `uses`, the
    updates on one rollout.
    """
    exact = steps * reference.total / own.total
    if abs(exact - steps) <= tolerance * steps:
        return steps
    return max(1, round(exact / uses)) * uses

"""Progress lines, and the learning-rate schedules of the build."""

from __future__ import annotations

import math
import time

import torch


class Log:
    """Prints means of the logged values every `every` steps, with seconds per step."""

    def __init__(self, name: str, steps: int, every: int = 100):
        self.name, self.steps, self.every = name, steps, every
        self.start, self.sums, self.count = time.monotonic(), {}, 0

    def __call__(self, step: int, **values: torch.Tensor) -> None:
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach()
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            means = "  ".join(f"{key} {float(value) / self.count:.4f}" for key, value in self.sums.items())
            seconds = (time.monotonic() - self.start) / self.count
            print(f"{self.name} {step + 1}/{self.steps}  {means}  {seconds:.3f} s/step", flush=True)
            self.start, self.sums, self.count = time.monotonic(), {}, 0


def cosine_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int = 100) -> None:
    """Linear warm-up, then half a cosine down to 2 % of `peak`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * fall


def flat_then_decay(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int = 200) -> None:
    """Linear warm-up, constant, and a linear decay to 2 % of `peak` over the last quarter of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    fall = max(0.02, min(1.0, 4 * (steps - step) / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * fall

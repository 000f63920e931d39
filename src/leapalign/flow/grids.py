"""Time grids of rectified-flow samplers: none, static and dynamic shift (SD3, arXiv 2403.03206, Eq. 23; FLUX's mu).

Every grid is `sigmas` [T + 1], ascending, indexed by remaining steps: sigmas[0] = 0 (image), sigmas[T] = 1
(noise). It is computed in float64 and rounded once; diffusers' own float32 sigmas agree within float32 rounding.
"""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor

from leapalign.errors import UserError


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Shift times u in [0, 1] towards the noise: s u / (1 + (s - 1) u); s = 1 is the identity."""
    return shift * u / (1 + (shift - 1) * u)


def sigma_grid(num_steps: int, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return T + 1 evenly spaced times under a static shift (1 = none)."""
    _check(num_steps, shift)
    return shift_time(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64), shift).to(dtype)


def dynamic_grid(num_steps: int, mu: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return FLUX's grid: e^mu / (e^mu + 1/u - 1) is a static shift by e^mu, with mu chosen from the image's size."""
    return sigma_grid(num_steps, exp(mu), dtype)


def flux_mu(
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return FLUX's mu: the line through (256 tokens, 0.5) and (4096 tokens, 1.15); 720 x 720 pixels: 2025 tokens."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (image_tokens - base_tokens)


def sd3_grid(
    num_steps: int, shift: float = 3.0, num_train_timesteps: int = 1000, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the default grid of diffusers' Stable Diffusion 3, where the shift acts twice.

    T evenly spaced times between 1 and the *shifted* smallest training time 1/1000, shifted again, then 0. The last
    step is therefore tiny (sigma_1 = 0.0089 at shift 3), and DRaFT-LV hardly trains on this grid.
    """
    _check(num_steps, shift)
    smallest = shift_time(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift).item()
    times = torch.linspace(1, smallest, num_steps, dtype=torch.float64)  # noise first, so that T = 1 is the noise
    return torch.cat([times.new_zeros(1), shift_time(times, shift).flip(0)]).to(dtype)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise UserError(f"grid: got {num_steps} steps, expected at least 1; raise the number of sampling steps")
    if not 0 < shift < float("inf"):
        raise UserError(f"grid: got shift {shift}, expected a positive number; 1 means no shift")

"""golden/schedules: diffusers' published grids; and diffusers' scheduler itself, asked for many more."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from golden_folder import GOLDEN
from leapalign.errors import UserError
from leapalign.flow.grids import dynamic_grid, flux_mu, sd3_grid, shift_time, sigma_grid
from leapalign.models import sd3
from leapalign.models.sd3 import SD3

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
FILE = GOLDEN / "schedules" / "sigmas.json"
FLOAT32 = {"rtol": 0, "atol": 3e-7}  # a few roundings at 1.0


@pytest.mark.skipif(not FILE.is_file(), reason=f"no {FILE}: set LEAPALIGN_GOLDEN to the golden data's folder")
def test_every_row():
    rows = json.loads(FILE.read_text())["rows"]
    assert rows
    for row in rows:
        expected = torch.tensor(row["sigmas"], dtype=torch.float32).flip(0)
        torch.testing.assert_close(grid_of(row), expected, **FLOAT32)


def grid_of(row: dict) -> torch.Tensor:
    if row["model"].startswith("FLUX"):
        assert row["mu"] == pytest.approx(flux_mu(row["image_seq_len"]), abs=1e-12)
        return dynamic_grid(row["steps"], row["mu"])
    if row["model"].startswith("SD3.5"):
        return sd3_grid(row["steps"], row["shift"])
    return sigma_grid(row["steps"], row["shift"])  # DanceGRPO's


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0])
def test_equal_to_diffusers_with_static_shift(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)  # what the SD3 pipeline does: the shift acts twice
    torch.testing.assert_close(sd3_grid(steps, shift), scheduler.sigmas.flip(0), **FLOAT32)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())  # given times: it acts once
    torch.testing.assert_close(sigma_grid(steps, shift), scheduler.sigmas.flip(0), **FLOAT32)


@pytest.mark.parametrize("steps", [2, 7, 25, 50])
def test_sd3_chooses_how_often_its_scheduler_shifts(steps):
    """The adapter's grids of the published scheduler: twice (the pipeline's, the default) or once."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SD3.published[MEDIUM].components["scheduler"][1])
    twice, once = (
        sd3.sigma_grid(config, scheduler, steps, (16, 64, 64), 2).flip(0)
        for config in (SD3(path=MEDIUM), SD3(path=MEDIUM, shift="once"))
    )
    torch.testing.assert_close(twice, sd3_grid(steps, 3.0), **FLOAT32)
    torch.testing.assert_close(once, sigma_grid(steps, 3.0), **FLOAT32)
    if steps == 25:  # the numbers of the documentation
        assert (float(twice[1]), float(once[1])) == (pytest.approx(0.0089, abs=1e-4), pytest.approx(0.1111, abs=1e-4))


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("tokens", [64, 256, 2025, 4096])
def test_equal_to_diffusers_with_dynamic_shift(steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = flux_mu(tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    torch.testing.assert_close(dynamic_grid(steps, mu), scheduler.sigmas.flip(0), **FLOAT32)


@pytest.mark.parametrize("grid", [sigma_grid(10), sigma_grid(10, 3.0), dynamic_grid(10, 0.8), sd3_grid(10)])
def test_ascending_from_image_to_noise(grid):
    assert grid.shape == (11,) and grid.dtype == torch.float32
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()


def test_no_shift_is_even_and_the_shift_has_an_inverse():
    torch.testing.assert_close(sigma_grid(4, dtype=torch.float64), torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(u, 3.0), 1 / 3.0), u)
    torch.testing.assert_close(shift_time(shift_time(u, 3.0), 2.0), shift_time(u, 6.0))  # shifts compose by product


@pytest.mark.parametrize("steps, shift", [(0, 1.0), (5, 0.0), (5, -1.0), (5, float("inf"))])
def test_impossible_grids_are_refused(steps, shift):
    for grid in (sigma_grid, sd3_grid):
        with pytest.raises(UserError, match="expected"):
            grid(steps, shift)

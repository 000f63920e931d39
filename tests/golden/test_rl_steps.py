"""golden/rl_steps: steps, log-probabilities, advantages and clipped losses of Flow-GRPO's and DanceGRPO's code.

float64 to 1e-12, float32 to 1e-5.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from golden_folder import GOLDEN, golden
from leapalign.flow.leap import leap
from leapalign.flow.sde import CPS, DanceSDE, FlowSDE, Kernel, sampled
from leapalign.methods.policy_gradient import Normalisation, clipped, normalised

FOLDER = GOLDEN / "rl_steps"


def cases(file: str) -> list:
    """One parameter a case; one skipped parameter where the folder is absent."""
    if not FOLDER.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {FOLDER}; set LEAPALIGN_GOLDEN"))]
    found = json.loads((FOLDER / file).read_text())
    return [pytest.param(case, id=str(case.get("key", case.get("name", i)))) for i, case in enumerate(found)]


def kernel_of(case: dict, dtype: torch.dtype) -> Kernel:
    if case["method"] == "dance_grpo":
        return DanceSDE(eta=case["eta"])
    if case["method"] == "flow_grpo_cps":
        return CPS(noise_level=case["noise_level"])
    return FlowSDE(noise_level=case["noise_level"], largest=torch.tensor(case["sigma_max"], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", cases("steps.json"))
def test_every_step(case, dtype):
    stored = load_file(golden("rl_steps") / "steps.safetensors")
    suffix = {torch.float64: "f64", torch.float32: "f32"}[dtype]
    x, v, v_new, z = (stored[f"{case['key']}.{name}"].to(dtype) for name in ("x", "v", "v_new", "z"))
    sigma, sigma_next = (stored[f"{case['key']}.{name}"] for name in ("sigma", "sigma_next"))

    def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)

    def expected(name: str) -> torch.Tensor:
        return stored[f"{case['key']}.{name}_{suffix}"]

    kernel = kernel_of(case, dtype)
    step = kernel(x, v, sigma, sigma_next)
    near(step.mean, expected("mean"))
    near(sampled(step, z), expected("x_next"))
    if case["method"] == "dance_grpo":
        near(leap(x, v, sigma.to(dtype), 0 * sigma.to(dtype)), expected("pred_original"))
    else:
        near(step.scale, expected("std_dev").flatten())
    near(kernel.log_prob(expected("x_next"), step), expected("log_prob"))
    again = kernel(x, v_new, sigma, sigma_next)
    near(kernel.log_prob(expected("x_next"), again), expected("log_prob_new"))


@pytest.mark.parametrize("case", cases("advantages.json"))
def test_every_advantage(case):
    if "batches" not in case:  # DanceGRPO, in float32 like its code
        rewards = torch.tensor(case["rewards"])
        groups = torch.arange(len(rewards)) // case["num_generations"]
        found = normalised(rewards, groups, Normalisation(std="group", eps=case["eps"], correction=1))
        torch.testing.assert_close(found, torch.tensor(case["advantages"]), rtol=1e-6, atol=1e-6)
        return
    settings = Normalisation(std="batch" if case["global_std"] else "group", eps=case["eps"], correction=0)
    for batch in case["batches"]:
        names = sorted(set(batch["prompts"]))
        groups = torch.tensor([names.index(prompt) for prompt in batch["prompts"]])
        found = normalised(torch.tensor(batch["rewards"], dtype=torch.float64), groups, settings)
        expected = torch.tensor(batch["advantages"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("policy_loss.json"))
def test_every_clipped_loss(case):
    old, new, given = (torch.tensor(case[name]) for name in ("log_prob_old", "log_prob_new", "advantages"))
    limit, ratio = case["adv_clip_max"], (new - old).exp()
    loss = clipped(given.clamp(-limit, limit), ratio, case["clip_range"])
    torch.testing.assert_close(ratio, torch.tensor(case["ratio"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, torch.tensor(case["per_sample_loss"]), rtol=1e-6, atol=1e-6)
    assert float(loss.mean()) == pytest.approx(case["mean_loss"], abs=1e-6)
    assert int((loss > -given.clamp(-limit, limit) * ratio).sum()) == case["clipped"]

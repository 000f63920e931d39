"""What every way of tuning keeps. The folder is the list: a new file in tuning/ without a case here fails."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leapalign.tuning
import tiny_pipelines as tiny
from leapalign.codec import encode, loads
from leapalign.errors import UserError
from leapalign.models.flux import Flux
from leapalign.monitors import NEVER, NOTHING
from leapalign.run import Run
from leapalign.training.engine import build
from leapalign.training.weights import trained_parameters
from leapalign.tuning.full import FullFineTuning
from leapalign.tuning.lora import LoRA

# Files that hold no way of tuning.
HELPERS = {"base", "adapter", "targets", "files", "quantization", "start", "strength"}
CASES: dict[str, Any] = {"full": FullFineTuning(), "lora": LoRA(rank=2, alpha=4.0)}
PROMPTS = ["a red circle"]


def found() -> dict[str, set[str]]:
    """file -> names of the configuration classes in it."""
    classes = {}
    for file in {module.name for module in pkgutil.iter_modules(leapalign.tuning.__path__)} - HELPERS:
        module = importlib.import_module(f"leapalign.tuning.{file}")
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        classes[file] = {c.__name__ for c in own if hasattr(c, "load_policy")}
    return classes


def test_every_way_of_tuning_has_a_case() -> None:
    covered = {type(case).__name__ for case in CASES.values()}
    for file, classes in found().items():
        assert classes, f"tuning/{file}.py holds no configuration; if it is a helper, list it in HELPERS"
        assert classes <= covered, f"tuning/{file}.py: no case for {classes - covered}"


@pytest.mark.parametrize("name", CASES)
def test_configuration_is_a_frozen_keyword_dataclass_with_defaults(name: str) -> None:
    cls = type(CASES[name])
    assert cls.name == name and cls.output and cls.formats and cls.__doc__
    assert cls.__dataclass_params__.frozen and all(f.kw_only for f in dataclasses.fields(cls))
    assert hash(cls()) == hash(cls())


@pytest.mark.parametrize("name", CASES)
def test_run_json_holds_it(name: str, tiny_run: Run) -> None:
    import json

    run = dataclasses.replace(tiny_run, tuning=CASES[name])
    assert loads(json.dumps(encode(run)), Run) == run


@pytest.mark.parametrize("name", CASES)
def test_configuration_imports_no_torch(name: str) -> None:
    module = type(CASES[name]).__module__
    code = f"import {module}, sys; assert not {{'torch', 'peft', 'diffusers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.flux_pipeline(), tmp_path_factory.mktemp("contract") / "base")


@pytest.fixture
def tiny_run(folder: str) -> Run:
    from leapalign.recipes import shapeworld_leapalign

    return dataclasses.replace(shapeworld_leapalign(), model=config(folder))


def config(folder: str) -> Flux:
    return Flux(path=folder, height=16, width=16, max_sequence_length=5)


def velocity(model: Any) -> Tensor:
    x = model.noise([torch.Generator().manual_seed(3)])
    return model.velocity(model.encode(PROMPTS))(x, torch.tensor(0.5))


@pytest.fixture(scope="module")
def base(folder: str) -> Tensor:
    return velocity(config(folder).load("cpu", "float32")).detach()


@pytest.mark.parametrize("name", CASES)
def test_it_begins_at_the_base_and_what_it_saves_is_the_tuned_model(
    name: str, folder: str, base: Tensor, tmp_path: Path
) -> None:
    tuning = CASES[name]
    model = config(folder).load("cpu", "float32", tuning)
    tuning.initialise(model.policy, 7)
    assert torch.equal(velocity(model), base)
    parameters = trained_parameters(model.policy)
    assert all(p.dtype == torch.float32 for p in parameters.values()) and not model.policy.training
    with torch.no_grad():
        for i, p in enumerate(parameters.values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    with tuning.in_update(model.policy, seed=0, step=1):
        tuned = velocity(model)
    assert torch.equal(velocity(model), tuned) and (tuned - base).abs().max() > 1e-3
    saved = tmp_path / tuning.output
    saved.mkdir()
    tuning.save(model, saved)
    again = tuning.load_tuned(config(folder), str(saved), "cpu", "float32")
    torch.testing.assert_close(velocity(again), tuned, rtol=1e-5, atol=1e-5)
    tuning.export(config(folder), str(saved), tmp_path / "out", format="pipeline", dtype="float32")
    exported = config(str(tmp_path / "out")).load("cpu", "float32")
    torch.testing.assert_close(velocity(exported), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_beginning_is_of_the_seed_alone(name: str, folder: str) -> None:
    tuning = CASES[name]
    model = config(folder).load("cpu", "float32", tuning)
    weights = []
    for seed in (1, 1):
        torch.rand(seed)
        tuning.initialise(model.policy, seed)
        weights.append({n: p.detach().clone() for n, p in model.policy.named_parameters()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_run_gives_its_seed(tiny_run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\n")
    from leapalign.prompts import PromptFile

    run = dataclasses.replace(tiny_run, monitors=NOTHING, stop_when=NEVER)  # plain prompts have no monitors
    run = dataclasses.replace(run, prompts=PromptFile(path=str(prompts)), tuning=CASES["lora"], device="cpu")
    one, two = (build(dataclasses.replace(run, seed=seed)).parameters for seed in (1, 2))
    assert any(not torch.equal(one[n], two[n]) for n in one)


def test_an_error_of_a_part_names_it(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors: cannot read"):
        CASES["lora"].load_tuned(config(folder), str(tmp_path), "cpu", "float32")

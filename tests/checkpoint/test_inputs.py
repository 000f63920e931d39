"""What a run depends on is compared when it is resumed: settings by meaning, prompts, weights and code by content."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

from leapalign.checkpoint import unchanged
from leapalign.checkpoint.inputs import anchored, base_changes, differing, inputs_of
from leapalign.checkpoint.state import digest
from leapalign.codec import dumps, encode
from leapalign.errors import UserError
from leapalign.lookup.recipes import read_run
from leapalign.lookup.sources import find_source
from leapalign.lookup.user_files import load_file
from leapalign.models.sd3 import SD3
from leapalign.monitors import NEVER, NOTHING
from leapalign.prompts import Prompt, PromptFile
from leapalign.recipes import shapeworld_leapalign
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm
from leapalign.storage.embedded import FOLDER
from leapalign.training import loop
from leapalign.tuning.lora import LoRA

SMALL = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "num_sampling_steps": 2, "evaluate_every": 0}


@pytest.fixture
def run(tmp_path):
    """One step of LoRA on a copy of the embedded base and reward, which a test may spoil."""
    for name in ("generator", "reward"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    base = replace(shapeworld_leapalign(), monitors=NOTHING, stop_when=NEVER)  # plain prompts have no monitors
    return replace(
        base,
        **SMALL,
        model=replace(base.model, path=str(tmp_path / "generator")),
        rewards=(RewardTerm(reward=PickScore(path=str(tmp_path / "reward")), threshold=2),),
        prompts=PromptFile(path=str(tmp_path / "prompts.txt")),
        tuning=LoRA(rank=2, alpha=4),
        out=str(tmp_path / "run"),
        self_checks=False,
    )


def scale_one_tensor(file: Path) -> None:
    tensors = read_tensors(file)
    name = sorted(tensors)[0]
    save_file({key: value * 1.5 if key == name else value for key, value in tensors.items()}, file)


def resumed(run, **how):
    return loop.train(replace(run, steps=run.steps + 1), resume=True, **how)


def test_each_input_that_changed_is_refused_by_name_and_may_be_allowed(run, tmp_path):
    loop.train(run)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert saved["folder"] == os.getcwd() and len(saved["derived"]["sigmas"]) == 3
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["inputs"] == saved["inputs"]

    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\nthree cats\n")
    scale_one_tensor(tmp_path / "generator" / "transformer" / "diffusion_pytorch_model.safetensors")
    scale_one_tensor(tmp_path / "generator" / "text_encoder" / "model.safetensors")
    scale_one_tensor(tmp_path / "reward" / "model.safetensors")
    with pytest.raises(UserError) as refused:
        resumed(run)
    listed = str(refused.value)
    assert "prompts: 2 texts in this order -> other texts (3 texts in this order)" in listed
    assert (
        "model.path: text_encoder/model.safetensors, transformer/diffusion_pytorch_model.safetensors changed" in listed
    )
    assert "rewards[0].reward.path: model.safetensors changed" in listed and "--allow-changes" in listed

    with pytest.warns(UserWarning, match=r"the base is not the one .* model.path: text_encoder/model.safetensors"):
        find_source(run.out, {})
    resumed(run, allow_changes=True)  # and from here on these are the run's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_source(run.out, {})
    loop.train(replace(run, steps=3), resume=True)


def test_a_grid_of_another_version_is_refused_by_name(run, monkeypatch):
    from leapalign.models.pipeline import PipelineModel

    loop.train(run)
    sigmas = PipelineModel.sigmas
    monkeypatch.setattr(PipelineModel, "sigmas", lambda self, n: sigmas(self, n) ** 1.1)
    with pytest.raises(UserError, match=r"sigmas: .*0\.0.* -> "):
        resumed(run)
    monkeypatch.setattr(PipelineModel, "sigmas", lambda self, n: sigmas(self, n) * (1 + 1e-7))
    resumed(run)


def test_whole_numbers_and_settings_that_a_record_lacks_are_no_changes(run):
    record = encode(run)
    record["tuning"]["alpha"], record["rewards"][0]["threshold"], record["max_grad_norm"] = 4, 2, 1
    del record["max_hours"], record["weight_decay"], record["model"]["cfg_grad"]
    assert unchanged.setting_changes(run, record, "") == []
    record["weight_decay"] = 0.5
    assert unchanged.setting_changes(run, record, "") == ["weight_decay: 0.5 -> 0.0001"]
    del record["method"]["nested_scale"]  # its default is another value than this recipe's
    assert "method.nested_scale: 0.3 -> 1.0" in unchanged.setting_changes(run, record, "")
    record["gone"] = 1  # a setting of another version: what is written is compared
    assert "gone: 1 -> null" in unchanged.setting_changes(run, record, "")


def test_relative_paths_mean_the_folder_in_which_the_run_was_started(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = replace(run.model, path="generator")
    loop.train(replace(run, out="run", prompts=PromptFile(path="prompts.txt"), model=model))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "prompts.txt").write_text("other words\n")  # by name the same file
    monkeypatch.chdir(elsewhere)
    again = replace(read_run(tmp_path / "run" / "run.json", {}), out=str(tmp_path / "run"))
    assert again.prompts == PromptFile(path=str(tmp_path / "prompts.txt"))
    assert again.model.path == str(tmp_path / "generator")
    resumed(again)
    find_source(str(tmp_path / "run"), {})

    shutil.move(tmp_path / "generator", tmp_path / "moved")
    with pytest.raises(UserError, match=r"model.path: .* not found"):
        resumed(again)


def test_words_that_name_no_file_are_left_alone(tmp_path):
    for name in ("train", "cond", "a prompt", "base"):
        (tmp_path / name).mkdir()
    run = replace(shapeworld_leapalign(), model=SD3(path="base", cfg_grad="cond", negative_prompt="a prompt"))
    moved = anchored(run, tmp_path)
    assert moved.model == replace(run.model, path=str(tmp_path / "base"))  # type: ignore[type-var]
    assert replace(moved, model=run.model) == run


def test_code_of_the_user_is_identified_with_the_modules_beside_it(tmp_path):
    (tmp_path / "beside_coded.py").write_text("SIZE = 1\n")
    (tmp_path / "lazy_coded.py").write_text("SIZE = 1\n")
    (tmp_path / "coded.py").write_text(
        "from dataclasses import dataclass\nimport beside_coded\n"
        "@dataclass(frozen=True)\nclass Mine:\n    def load(self, device, dtype):\n        import lazy_coded\n"
    )
    reward = load_file(str(tmp_path / "coded.py")).Mine()
    run = replace(shapeworld_leapalign(), rewards=(RewardTerm(reward=reward, threshold=1),))
    assert inputs_of(run, [])["code"].keys() == {"beside_coded.py", "coded.py"}
    reward.load("cpu", "float32")  # the import inside the function finds the module too
    old = inputs_of(run, [])
    assert old["code"].keys() == {"beside_coded.py", "lazy_coded.py", "coded.py"}
    (tmp_path / "lazy_coded.py").write_text("SIZE = 2\n")
    assert differing(old, inputs_of(run, [], old)) == ["code: lazy_coded.py changed"]


def test_prompts_count_in_their_order():
    run, texts = shapeworld_leapalign(), [Prompt(text="a"), Prompt(text="b")]
    assert differing(inputs_of(run, texts), inputs_of(run, texts)) == []
    assert len(differing(inputs_of(run, texts), inputs_of(run, texts[::-1]))) == 1


def test_a_record_that_cannot_be_read(tmp_path):
    (tmp_path / "run.json").write_text(dumps(shapeworld_leapalign()))
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs.json: cannot be read"):
        read_run(tmp_path / "run.json", {})
    (tmp_path / "inputs.json").unlink()
    assert base_changes(read_run(tmp_path / "run.json", {}), tmp_path) == []


def test_older_checkpoints_without_a_record_resume(run, tmp_path):
    loop.train(run)
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    state = json.loads((folder / "state.json").read_text())
    for key in ("folder", "inputs", "derived", "self"):
        del state[key]
    (folder / "state.json").write_text(json.dumps(state | {"self": digest(state)}))
    (tmp_path / "run" / "inputs.json").unlink()
    assert resumed(run).summary["steps"] == 2


def test_every_tensor_counts_and_no_name(tmp_path):
    from leapalign.storage.identity import content_identity

    tensors = {"big": torch.randn(1000, 300), "small": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert content_identity(tmp_path / "a.safetensors") == content_identity(tmp_path / "b.safetensors")
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, tmp_path / "c.safetensors")
        assert content_identity(tmp_path / "a.safetensors") != content_identity(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"no header")
    assert len(content_identity(tmp_path / "d.safetensors")) == 64

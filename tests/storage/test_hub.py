"""The hub without the hub: its cache, its listing and its errors are made here."""

from __future__ import annotations

import errno
import re
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from hub_cache import COMMIT, lay_out
from leapalign.errors import UserError
from leapalign.models.sd3 import SD3
from leapalign.storage.hub import commit_of, find_file, is_hub_id, no_such_place, snapshot, split_id
from leapalign.storage.pipeline_folder import VARIANTS, locate, needed_files

try:
    import httpx2 as httpx  # the client of huggingface_hub 2
except ModuleNotFoundError:
    import httpx  # that of huggingface_hub 1

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 5, "guidance_scale": 1.0}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def first_weight(path: str, **settings: Any) -> torch.Tensor:
    return next(SD3(path=path, **SIZE, **settings).load("cpu", "float32").policy.parameters()).detach()


@pytest.mark.parametrize("revision", ["main", "v1.0"])
def test_hub_id_opens_from_the_cache_without_a_network(revision: str, sd3_folder: str, cache: Path) -> None:
    lay_out(Path(sd3_folder), cache, "org/tiny", revision)
    name = "org/tiny" if revision == "main" else f"org/tiny@{revision}"
    model = SD3(path=name, **SIZE).load("cpu", "float32")
    assert commit_of(model.folder.path) == COMMIT and commit_of(Path(sd3_folder)) == ""
    assert torch.equal(next(model.policy.parameters()), first_weight(sd3_folder))
    with pytest.raises(UserError, match="org/tiny@other: HF_HUB_OFFLINE forbids"):
        first_weight("org/tiny@other")
    assert torch.equal(first_weight(f"org/tiny@{COMMIT}"), first_weight(sd3_folder))


def test_what_is_not_in_the_cache_is_answered_at_once(cache: Path) -> None:
    """hf_hub_download would try again for 23 s, for each file, where there is no network."""
    begun = time.monotonic()
    assert find_file("org/none", "config.json") is None
    assert find_file("no hub id", "config.json") is None
    assert time.monotonic() - begun < 5


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question to the hub is an error."""

    def asked(*args, **kwargs):
        raise AssertionError(f"the hub was asked: {args} {kwargs}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


@pytest.mark.parametrize("word", ["runs/mien", "./mine", "../mine", "~/mine", "/mine", "mine", "here/mien", "a/b/mine"])
def test_a_word_that_means_a_place_is_not_asked_of_the_hub(word, tmp_path, monkeypatch, no_network) -> None:
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(word)
    assert find_file(word, "config.json") is None
    with pytest.raises(UserError, match=f"{re.escape(word)}: folder not found"):
        locate(word)


def test_a_near_name_is_suggested_and_a_folder_of_an_organisation_is_told(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "org" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert no_such_place("runs/mien").endswith("folder not found; did you mean 'runs/mine'?")
    assert "hf download org/name" in no_such_place("org/name")


def test_a_folder_of_an_organisation_hides_no_model_of_the_cache(cache: Path, tmp_path, monkeypatch) -> None:
    (tmp_path / "org").mkdir()
    (cache / "models--org--tiny" / "snapshots" / "main").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/tiny") and not is_hub_id("org/none")


def test_ids() -> None:
    assert split_id("org/name") == ("org/name", "main")
    assert split_id("org/name@refs/pr/3") == ("org/name", "refs/pr/3")
    with pytest.raises(UserError, match="expected org/name or org/name@revision"):
        split_id("a/b/c")


FLUX_FILES = """model_index.json README.md LICENSE.md ae.safetensors flux1-dev.safetensors dev_grid.jpg
scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors
text_encoder_2/config.json
text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model-00002-of-00002.safetensors
text_encoder_2/model.safetensors.index.json tokenizer/merges.txt tokenizer/vocab.json tokenizer/tokenizer_config.json
tokenizer_2/spiece.model tokenizer_2/tokenizer.json vae/config.json vae/diffusion_pytorch_model.safetensors
transformer/config.json transformer/diffusion_pytorch_model.safetensors.index.json
transformer/diffusion_pytorch_model-00001-of-00002.safetensors
transformer/diffusion_pytorch_model-00002-of-00002.safetensors"""
UNNEEDED = {"README.md", "ae.safetensors", "flux1-dev.safetensors", "dev_grid.jpg"}
MORE = """text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin text_encoder/model.onnx
text_encoder_2/model.fp16-00001-of-00002.safetensors text_encoder_2/model.safetensors.index.fp16.json
vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.safetensors safety_checker/model.safetensors"""
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


def test_only_needed_files_are_asked_for() -> None:
    """Neither the authors' own checkpoints, nor other precisions, pickles or parts that the index does not name."""
    files = [*FLUX_FILES.split(), *MORE.split()]
    chosen = set(filter_repo_objects(files, allow_patterns=needed_files(PARTS), ignore_patterns=[*VARIANTS]))
    assert chosen == set(FLUX_FILES.split()) - UNNEEDED
    patterns = needed_files(PARTS, with_transformer=False)
    assert chosen - set(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=[*VARIANTS])) == {
        file for file in FLUX_FILES.split() if file.startswith("transformer/") and file != "transformer/config.json"
    }


def test_download_asks_for_the_index_first_and_then_for_its_parts(
    sd3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, local, asked = Path(shutil.copytree(sd3_folder, tmp_path / "remote")), tmp_path / "local", []
    for extra in ("sd3.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"):
        (remote / extra).write_bytes(b"-")

    def download(
        repo: str, *, repo_type: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        files = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
        files = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        asked.append((repo, revision, len(files)))
        for file in files:
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / file, local / file)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(first_weight("org/tiny@v2"), first_weight(sd3_folder))
    assert [(repo, revision) for repo, revision, _ in asked] == [("org/tiny", "v2")] * 2 and asked[0][2] == 1
    expected = {file.relative_to(sd3_folder) for file in Path(sd3_folder).rglob("*") if file.is_file()}
    assert {file.relative_to(local) for file in local.rglob("*") if file.is_file()} == expected

    shutil.rmtree(local)
    file = str(
        shutil.copy(remote / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "own.safetensors")
    )
    assert torch.equal(first_weight("org/tiny", transformer_file=file), first_weight(sd3_folder))
    assert [f.name for f in (local / "transformer").iterdir()] == ["config.json"]

    (remote / "model_index.json").unlink()
    shutil.rmtree(local)
    with pytest.raises(UserError, match="org/tiny is not a diffusers pipeline"):
        first_weight("org/tiny")


def http(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/api/models/org/tiny")
    return kind("words of the server", response=httpx.Response(status, request=request))  # type: ignore[call-arg]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAILURES = {
    "gated": (
        http(errors.GatedRepoError, 403),
        r"gated: accept its licence on https://huggingface.co/org/tiny .*hf auth",
    ),
    "missing": (http(errors.RepositoryNotFoundError, 404), "no model of this name, or it is private: check the name"),
    "disabled": (http(errors.DisabledRepoError, 403), "disabled this repository: .* folder with your own copy"),
    "revision": (http(errors.RevisionNotFoundError, 404), "no revision 'v9': choose one of its branches"),
    "revoked": (http(errors.HfHubHTTPError, 401), "refuses your token.*settings/tokens and run `hf auth login`"),
    "narrow token": (http(errors.HfHubHTTPError, 403), "your token may not read org/tiny: give it that permission"),
    "too many": (http(errors.HfHubHTTPError, 429), "too many requests.*wait some minutes"),
    "hub down": (
        caused(errors.LocalEntryNotFoundError("no"), http(errors.HfHubHTTPError, 503)),
        r"internal error \(status 503\): try again later",
    ),
    "offline": (
        caused(errors.LocalEntryNotFoundError("no"), errors.OfflineModeIsEnabled("no")),
        "HF_HUB_OFFLINE forbids the network.*unset it, or fetch it where there is a network",
    ),
    "no network": (
        caused(errors.LocalEntryNotFoundError("no"), httpx.ConnectError("Name or service not known")),
        r"cannot be reached \(Name or service not known\): check network and proxy",
    ),
    "proxy": (httpx.ProxyError("407"), r"cannot be reached \(407\): check network and proxy"),
    "half fetched": (errors.LocalEntryNotFoundError("no"), "not completely in the cache"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), "disk of the hub's cache is full.*HF_HOME"),
    "read-only": (PermissionError(errno.EACCES, "Permission denied"), "cannot be written.*HF_HOME"),
    "unknown": (RuntimeError("something\nelse"), r"download failed \(RuntimeError: something\): try again"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_has_its_own_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, sentence = FAILURES[name]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"^org/tiny@v9: .*{sentence}") as raised:
        snapshot("org/tiny@v9", ["model_index.json"])
    assert "\n" not in str(raised.value)
    assert find_file("org/tiny@v9", "model_index.json") is None


def test_saved_folder_has_one_precision_of_each_weight(sd3_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder, tmp_path / "copy"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    SD3(path=str(folder), **SIZE).load("cpu", "float32").save(tmp_path / "saved")
    assert [file.name for file in (tmp_path / "saved" / "vae").glob("*.safetensors")] == [weights.name]

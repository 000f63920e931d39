"""Prompts on disk: the same bits, the encoders not loaded again, damage found, several processes, a limit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_cache import lay_out
from leapalign.errors import UserError
from leapalign.models.base import Text
from leapalign.models.flux import Flux
from leapalign.models.prompt_embeds import location as prompt_place
from leapalign.models.prompt_embeds import store as prompt_store
from leapalign.models.prompt_embeds.cache import BATCH, PromptCache
from leapalign.models.prompt_embeds.location import cache_plan, prune
from leapalign.models.prompt_embeds.store import PromptStore, file_hash, fingerprint
from leapalign.models.sd3 import SD3
from leapalign.storage.pipeline_folder import PipelineFolder

SIZE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 5}
PROMPTS = ["a red circle", "two blue star", "green"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path / "prompts"))
    monkeypatch.setattr(prompt_store, "WORTHWHILE", 0)  # tiny encoders are cached too
    return tmp_path / "prompts"


def store(root: Path, most: int = 10**9, **settings: Any) -> PromptStore:
    """Of no model at all: the key is that of the settings."""
    folder = PipelineFolder(path=root.parent / "model", components={})
    return PromptStore(root=root, limit=most, folder=folder, components=(), settings=settings)


def row(seed: int, length: int = 3) -> Text:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, length, 4, generator=generator).bfloat16()
    return Text(tokens, torch.randn(1, 2, generator=generator), torch.ones(1, length, dtype=torch.bool))


def encoder(log: list[str], tokens: int = 3) -> Callable[[], Callable[[list[str]], Text]]:
    """Notes what it encodes; a prompt's row is made of its length."""

    def load() -> Callable[[list[str]], Text]:
        def encode(prompts: list[str]) -> Text:
            log.extend(dict.fromkeys(prompts))
            return Text.stack([row(len(prompt), tokens) for prompt in prompts])

        return encode

    return load


def never() -> Any:
    raise AssertionError("the text encoders were loaded")


def same(a: Text, b: Text) -> bool:
    pairs = ((a.tokens, b.tokens), (a.pooled, b.pooled), (a.mask, b.mask))
    return all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)  # type: ignore


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_run_never_loads_the_encoders(
    family: str, dtype: str, request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, the negative prompt included; and a run without a cache on disk gives the same numbers."""
    from leapalign.models import flux, sd3

    guidance = {"guidance_scale": 2.0} if family == "sd3" else {"true_cfg_scale": 2.0}
    folder = request.getfixturevalue(f"{family}_folder")
    config = {"sd3": SD3, "flux": Flux}[family](path=folder, negative_prompt="blurry", **guidance, **SIZE)
    first = config.load("cpu", dtype)
    first.prepare(PROMPTS)
    encoded = first.encode(PROMPTS)
    assert len(list(place.glob("*/*.safetensors"))) == 4
    with monkeypatch.context() as patch:
        patch.setenv("LEAPALIGN_CACHE_GB", "0")
        assert same(config.load("cpu", dtype).encode(PROMPTS).prompts, encoded.prompts)

    monkeypatch.setattr({"sd3": sd3, "flux": flux}[family], "_text_encoder", lambda *_: never())
    second = config.load("cpu", dtype)
    second.prepare(PROMPTS)
    again = second.encode(PROMPTS)
    assert same(again.prompts, encoded.prompts) and again.negative and same(again.negative, encoded.negative)
    with pytest.raises(AssertionError, match="were loaded"):
        second.encode(["a new one"])


def test_key_is_made_of_everything_that_decides_an_embedding(
    sd3_folder: str, flux_folder: str, place: Path, tmp_path: Path
) -> None:
    def key(folder: str | Path, dtype: str = "float32", **changes: Any) -> Path:
        model = SD3(path=str(folder), **{**SIZE, **changes}).load("cpu", dtype)
        assert model.prompts.store
        return model.prompts.store.home

    base = key(sd3_folder)
    copy = Path(shutil.copytree(sd3_folder, tmp_path / "copy"))
    assert key(copy) == base == key(sd3_folder, height=32, guidance_scale=3.0)  # content, not place; not the size
    assert key(sd3_folder, max_sequence_length=6) != base != key(sd3_folder, "bfloat16")
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert key(copy) == base  # a tuned transformer encodes no prompts
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert key(copy) != base
    flux = Flux(path=flux_folder, **SIZE).load("cpu", "float32")
    assert flux.prompts.store and flux.prompts.store.home != base


def test_hub_snapshot_and_its_copy_share_entries(sd3_folder: str, tmp_path: Path, place: Path) -> None:
    """The hub's names of large files are their sha256, so nothing is read."""
    snapshot = lay_out(Path(sd3_folder), tmp_path / "hub", "org/tiny")
    weights = "text_encoder/model.safetensors"
    (snapshot / weights).resolve().write_bytes(b"not read")
    assert fingerprint(snapshot, ("text_encoder",), place) == fingerprint(Path(sd3_folder), ("text_encoder",), place)


def test_hash_of_a_local_file_is_remembered_until_it_changes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leapalign.storage import files

    (tmp_path / "a").write_bytes(b"one")
    first = file_hash(tmp_path / "a", place)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", lambda _: never())
        assert file_hash(tmp_path / "a", place) == first
    (tmp_path / "a").write_bytes(b"another")
    assert file_hash(tmp_path / "a", place) != first
    noted = next(f for f in (place / "hashes").iterdir() if f.read_text() == first)
    noted.write_text("")
    (tmp_path / "a").write_bytes(b"one")
    assert file_hash(tmp_path / "a", place) == first


def test_small_encoders_are_not_cached(sd3_folder: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded ShapeWorld model's: they run again in the time that files take."""
    monkeypatch.undo()
    monkeypatch.setenv("LEAPALIGN_CACHE", str(place))
    SD3(path=sd3_folder, **SIZE).load("cpu", "float32").prepare(PROMPTS)
    assert not place.exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def reshape(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"shape":[1,3,4]', b'"shape":[1,4,3]'))


def garbage(file: Path) -> None:
    file.write_bytes(b"<!DOCTYPE html>")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def of_another_prompt(file: Path) -> None:
    other = next(f for f in file.parent.glob("*.safetensors") if f != file)
    shutil.copyfile(other, file)


@pytest.mark.parametrize("spoil", [cut, flip, reshape, garbage, empty, of_another_prompt])
@pytest.mark.parametrize("when", ["before", "in the run"])
def test_damaged_entry_is_reported_and_encoded_again(spoil: Callable[[Path], None], when: str, place: Path) -> None:
    log: list[str] = []
    PromptCache(encoder(log), "cpu", store(place)).prepare(["one", "three"])
    damaged = store(place).file("three")
    cache = PromptCache(encoder(log), "cpu", store(place))
    if when == "in the run":
        cache.prepare(["one", "three"])
    spoil(damaged)
    log.clear()
    with pytest.warns(UserWarning, match=f"{damaged.name}.*encoded again"):
        rows = cache(["one", "three"])
    assert log == ["three"]
    assert same(rows, Text.stack([row(3), row(5)]))
    assert same(PromptCache(never, "cpu", store(place))(["one", "three"]), rows)  # mended


def test_entry_that_another_process_removed_is_encoded_again(place: Path) -> None:
    log: list[str] = []
    PromptCache(encoder(log), "cpu", store(place)).prepare(["one"])
    cache = PromptCache(encoder(log), "cpu", store(place))
    cache.prepare(["one"])
    store(place).file("one").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache(["one"]), row(3))
    assert log == ["one", "one"]


def test_memory_is_bounded_where_rows_can_be_read_again(place: Path) -> None:
    prompts = ["x" * n for n in range(1, 3 * BATCH)]
    each = 3 * 4 * 2 + 2 * 4 + 3
    log: list[str] = []
    cache = PromptCache(encoder(log), "cpu", store(place), memory=5 * each)
    cache.prepare(prompts)
    assert len(cache._rows) == 5 and cache._bytes == 5 * each
    rows = cache(prompts)
    assert len(log) == len(prompts) and len(cache._rows) == 5
    assert all(torch.equal(rows.tokens[i], row(len(prompt)).tokens[0]) for i, prompt in enumerate(prompts))
    unbounded = PromptCache(encoder(log), "cpu", None, memory=5 * each)  # nothing to read them from
    unbounded.prepare(prompts)
    assert len(unbounded._rows) == len(prompts)


def test_limit_removes_what_was_used_least_recently(place: Path) -> None:
    old, new = store(place, run="old"), store(place, run="new")
    PromptCache(encoder([], 300), "cpu", old).prepare(["a", "bb", "ccc"])
    for age, prompt in ((300, "a"), (100, "bb"), (200, "ccc")):
        os.utime(old.file(prompt), (time.time() - age,) * 2)
    PromptCache(never, "cpu", store(place, run="old")).prepare(["a"])  # used now
    size = old.file("a").stat().st_size
    tight = store(place, most=5 * size, run="new")
    PromptCache(encoder([], 300), "cpu", tight).prepare(["dddd", "eeeee"])
    assert not old.file("ccc").exists() and old.file("a").exists() and old.file("bb").exists()
    assert new.file("dddd").exists() and new.file("eeeee").exists()
    assert sum(file.stat().st_size for file in place.glob("*/*.safetensors")) <= 5 * size


def test_own_entries_are_never_pruned_and_too_many_are_refused(place: Path) -> None:
    tight = store(place, most=1500)  # with its header a row takes some 500 bytes
    with pytest.raises(UserError, match=r"take .* GB, the cache at .* may hold .*; raise LEAPALIGN_CACHE_GB"):
        PromptCache(encoder([]), "cpu", tight).prepare(["a", "bb", "ccc", "dddd", "eeeee"])
    assert not list(place.glob("*/*.safetensors"))
    kept = store(place)
    PromptCache(encoder([]), "cpu", kept).prepare(["a", "bb"])
    prune(place, 0, keep=kept.needed)
    assert len(list(place.glob("*/*.safetensors"))) == 2
    assert prune(place, 0) > 0 and not list(place.glob("*/*.safetensors"))


def test_what_killed_processes_left_is_removed_when_it_is_old(place: Path) -> None:
    home = store(place).home
    for name, age in (("old", 2 * prompt_place.STALE), ("new", 1.0)):
        file = home / f"{prompt_place.SCRATCH}{name}"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    prune(place, 10**9)
    assert [f.name for f in home.glob(f"{prompt_place.SCRATCH}*")] == [f"{prompt_place.SCRATCH}new"]


def write_and_read(root: Path) -> None:
    warnings.simplefilter("error")  # a damaged entry would be reported by one
    mine = store(root)
    for turn in range(20 * 5):
        n = turn % 5
        mine.write(f"prompt {n}", Text(torch.full((1, 300, 40), float(n))))
        text = mine.read(f"prompt {n}")
        assert text is not None and bool((text.tokens == n).all())


def test_several_processes_write_the_same_entries(place: Path) -> None:
    """Every read in between sees a whole entry."""
    running = [multiprocessing.get_context("fork").Process(target=write_and_read, args=(place,)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert len(list(place.glob("*/*.safetensors"))) == 5 and not list(place.glob("*/.tmp-*"))


def test_place_and_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAPALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prompt_place.place() == tmp_path / "leapalign" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prompt_place.place() == Path.home() / ".cache" / "leapalign" / "prompts"
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path / "mine"))
    assert prompt_place.place() == tmp_path / "mine"
    assert prompt_place.limit() == 100e9
    monkeypatch.setenv("LEAPALIGN_CACHE_GB", "0.5")
    assert prompt_place.limit() == 5e8
    for wrong in ("many", "-1", "inf", "nan"):
        monkeypatch.setenv("LEAPALIGN_CACHE_GB", wrong)
        with pytest.raises(UserError, match="expected gigabytes"):
            prompt_place.limit()


def test_plan_says_what_fits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux = 4_195_840  # bytes a prompt, T5 and CLIP in bfloat16; tests/planning derives it
    monkeypatch.setattr(prompt_place, "free_bytes", lambda _: 10**12)
    assert cache_plan(19_200, flux).problem == ""
    assert "take 210 GB" in cache_plan(50_000, flux).problem
    monkeypatch.setattr(prompt_place, "free_bytes", lambda _: 10**9)
    assert "has 1 GB free; set LEAPALIGN_CACHE" in cache_plan(19_200, flux).problem
    monkeypatch.setenv("LEAPALIGN_CACHE_GB", "0")
    assert cache_plan(50_000, flux).problem == ""


def test_place_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*LEAPALIGN_CACHE_GB=0"):
        PromptCache(encoder([]), "cpu", store(tmp_path / "file" / "below")).prepare(["a"])

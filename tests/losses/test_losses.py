"""Golden losses: the first steps of one variant are the stored ones, and the comparison reports a changed number."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benches" / "losses.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benches_losses", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def stored(bench, name: str):
    return bench.loads((bench.STORED / f"{name}.txt").read_text(encoding="utf-8"))


def changed(losses, step: int, column: str, value: str):
    rows = [row | {column: value} if row["step"] == str(step) else row for row in losses.rows]
    return replace(losses, rows=rows)


def test_the_first_steps_are_the_stored_ones(bench, tmp_path):
    new = bench.measure(replace(bench.VARIANTS["leapalign"], steps=3), tmp_path)
    old = stored(bench, "leapalign")
    first = replace(old, header=new.header, rows=old.rows[:3], ends=new.ends)
    same_class = old.header["machine"] == new.header["machine"]
    assert not bench.departures(first, new, bench.EXACT if same_class else bench.FLOAT32)
    assert all(len(sha256) == 64 for sha256 in (new.ends["weights"], new.ends["average"]))


def test_every_variant_is_stored_and_no_other(bench):
    assert {path.stem for path in bench.STORED.glob("*.txt")} == set(bench.VARIANTS)
    for name, variant in bench.VARIANTS.items():
        losses, now = stored(bench, name), bench.header_of(variant)
        assert len(losses.rows) == variant.steps
        assert {key: now[key] for key in ("recipe", "settings", "ranks")} == {
            key: losses.header[key] for key in ("recipe", "settings", "ranks")
        }


def test_text_and_back(bench):
    text = (bench.STORED / "leapalign.txt").read_text(encoding="utf-8")
    assert bench.dumps(bench.loads(text)) == text


def test_a_changed_digit_is_reported_with_its_step_and_column(bench):
    old = stored(bench, "leapalign")
    value = old.rows[6]["loss"]
    other = repr(float(value) * (1 + 1e-7))
    found = bench.departures(old, changed(old, 7, "loss", other), bench.EXACT)
    assert found == [f"step 7, loss: {value} is stored, this run has {other}"]


def test_the_first_departure_comes_first(bench):
    old = stored(bench, "leapalign")
    found = bench.departures(old, changed(changed(old, 9, "loss", "1.0"), 4, "grad_norm", "1.0"), bench.EXACT)
    assert [line.split(":")[0] for line in found] == ["step 4, grad_norm", "step 9, loss"]


def test_within_a_tolerance_small_departures_later_steps_and_hashes_do_not_count(bench):
    old = stored(bench, "leapalign")
    largest = max(float(row["loss"]) for row in old.rows)
    near = repr(float(old.rows[2]["loss"]) + 0.009 * largest)
    far = repr(float(old.rows[2]["loss"]) + 0.011 * largest)
    three_steps = bench.Tolerance(scores=0.01, grad_norm=0.0, steps=3)
    other_weights = replace(changed(old, 3, "loss", near), ends=old.ends | {"weights": "0"})
    assert bench.departures(old, other_weights, three_steps) == []
    assert bench.departures(old, changed(old, 4, "loss", far), three_steps) == []
    assert len(bench.departures(old, changed(old, 3, "loss", far), three_steps)) == 1
    assert len(bench.departures(old, changed(old, 3, "loss", "nan"), three_steps)) == 1


@pytest.mark.parametrize("end", ["weights", "average", "evaluation_reward"])
def test_other_weights_with_equal_losses_are_reported(bench, end):
    old = stored(bench, "leapalign")
    (found,) = bench.departures(old, replace(old, ends=old.ends | {end: "other"}), bench.EXACT)
    assert found.startswith(f"end, {end}: ")


def test_missing_steps_columns_and_other_settings_are_reported(bench):
    old = stored(bench, "leapalign")
    assert "20 steps are stored" in bench.departures(old, replace(old, rows=old.rows[:-1]), bench.FLOAT32)[0]
    without = [{k: v for k, v in row.items() if k != "reward"} for row in old.rows]
    assert bench.departures(old, replace(old, rows=without), bench.FLOAT32)[0].startswith("step 1, reward: ")
    assert bench.departures(old, replace(old, header=old.header | {"ranks": "2"}), bench.FLOAT32)[0].startswith(
        "ranks: "
    )


def test_the_verdict_is_the_exit_status(bench, capsys):
    old = stored(bench, "leapalign")
    assert bench._verdict("leapalign", old, old, "1 s") == 0
    assert bench._verdict("leapalign", old, changed(old, 5, "reward", "9.0"), "1 s") == 1
    assert "step 5, reward: " in capsys.readouterr().out


def test_ranks_parts_hash_as_the_whole_tensor(bench, tmp_path):
    import torch
    from safetensors.torch import save_file

    whole = torch.arange(12.0).reshape(4, 3)
    save_file({"w": whole}, tmp_path / "weights.safetensors")
    for rank, part in enumerate(whole.chunk(2), 1):
        save_file({"weights/w": part.contiguous()}, tmp_path / f"shard-0000{rank}-model-00001-of-00003.safetensors")
    one, parts = (bench.tensors_hash(tmp_path.glob(p), "weights") for p in ("weights*", "shard*"))
    assert one == parts

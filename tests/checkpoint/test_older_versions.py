"""Runs and checkpoints of the version before fields were renamed: read, and what is different about them told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from leapalign.cli import main
from leapalign.codec import dumps, encode, loads
from leapalign.errors import UserError
from leapalign.recipes import shapeworld_leapalign
from leapalign.run import Run
from leapalign.storage.files import sha256
from leapalign.training import loop

FORMER = {"evaluate_every": "probe_every", "evaluation_size": "probe_size", "evaluation_seed": "probe_seed"}


def small(out: Path, **settings: object) -> Run:
    tiny = {"batch_size": 2, "micro_batch_size": 2, "num_sampling_steps": 3, "steps": 1, "checkpoint_every": 1}
    quick = {"device": "cpu", "evaluate_every": 0, "self_checks": False, "async_checkpoints": False}
    return replace(shapeworld_leapalign(), out=str(out), **(tiny | quick | settings))  # type: ignore[arg-type]


def with_former_names(record: dict) -> dict:
    return {FORMER.get(name, name): value for name, value in record.items()}


def as_before(out: Path) -> None:
    """Rewrite a run as the older version wrote it: former names, no count of samples, no scheme of seeds."""
    folder = out / "checkpoints" / "step-000001"
    for file in (out / "run.json", folder / "run.json"):
        file.write_text(json.dumps(with_former_names(json.loads(file.read_text()))))
    state = json.loads((folder / "state.json").read_text())
    state = {key: value for key, value in state.items() if key not in ("samples", "seeds", "inputs", "derived", "self")}
    state["bad_batches"] = state.pop("nonfinite_batches")
    state["files"]["run.json"] = sha256(folder / "run.json")
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state | {"self": digest}))


def test_former_names_are_read_in_a_recipe_and_in_run_json(tmp_path: Path) -> None:
    run = small(tmp_path / "run", evaluate_every=7)
    values = {f.name: getattr(run, f.name) for f in fields(run) if f.name != "evaluate_every"}
    assert Run(**values, probe_every=7) == run  # type: ignore[call-arg]
    assert loads(json.dumps(with_former_names(encode(run))), Run) == run
    assert "probe" not in dumps(run)


def test_former_flags_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--probe-every 0 --max-bad-batches=3 --batch-size 3 --micro-batch-size 2"  # the last two do not fit
    assert main(["train", "shapeworld-leapalign", *flags.split(), "--out", str(tmp_path / "run")]) == 2
    assert "batch_size 3" in capsys.readouterr().err


def test_older_checkpoint_is_resumed_once_its_other_random_numbers_are_allowed(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    loop.train(run)
    as_before(tmp_path / "run")
    longer = replace(run, steps=2)
    with pytest.raises(UserError, match="random numbers: version 1 of leapalign"):
        loop.train(longer, resume=True)
    loop.train(longer, resume=True, allow_changes=True)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert (state["samples"], state["seeds"]) == (4, 2)

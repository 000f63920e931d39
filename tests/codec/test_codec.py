"""run.json: what is written comes back equal, and everything odd is refused with a place and a reason."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapalign.codec import classes_in, decode, dumps, encode, loads
from leapalign.codec.messages import KINDS
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file
from leapalign.methods.base import Method
from leapalign.models.base import ModelConfig
from leapalign.prompts import PromptFile, Prompts
from leapalign.recipes import RECIPES, shapeworld_leapalign
from leapalign.rewards.base import RewardConfig
from leapalign.run import Run, config_hash, differences
from leapalign.tuning.base import Tuning
from leapalign.tuning.lora import LoRA

TINY_FILE = Path(__file__).parents[1] / "training" / "tiny_recipe.py"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_round_trips(name):
    run = RECIPES[name]()
    assert loads(dumps(run), Run) == run
    assert dumps(loads(dumps(run), Run)) == dumps(run)


@given(st.floats(0, 1e3, allow_nan=False), st.integers(0, 2**62), st.text(min_size=1), st.integers(1, 9))
def test_every_number_and_text_round_trips(rate, seed, name, half):
    changes = {"learning_rate": rate, "seed": seed, "name": name, "batch_size": 2 * half, "micro_batch_size": half}
    run = replace(shapeworld_leapalign(), **changes, prompts=PromptFile(path=name))
    assert loads(dumps(run), Run) == run


def spoiled(**changes: Any) -> str:
    """A recipe's JSON with some keys replaced: `a__b` is key b inside a; a value of ... removes the key."""
    record = encode(shapeworld_leapalign())
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = record
        for parent in parents:
            inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
        inner[last] = value
        if value is ...:
            del inner[last]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (spoiled(learning_rat=1), r"run.json: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        (spoiled(method__nested_scal=1), r"method: unknown key 'nested_scal'; did you mean 'nested_scale'\?"),
        (spoiled(steps="10"), 'steps: expected a whole number, got a text "10"'),
        (spoiled(steps=True), "steps: expected a whole number, got true or false true"),
        (spoiled(steps=1.0), "steps: expected a whole number, got a number 1.0"),
        (spoiled(learning_rate="3e-5"), 'learning_rate: expected a number, got a text "3e-5"'),
        (spoiled(betas=[0.9]), "betas: expected 2 values, got 1"),
        (spoiled(betas=0.9), "betas: expected a list, got a number"),
        (spoiled(graph="block"), "graph: 'block' is not one of 'all', 'blocks', 'inputs'; did you mean 'blocks'"),
        (spoiled(model=...), "missing 'model'"),
        (spoiled(model="sd3"), "model: expected a configuration of leapalign.models, got a text"),
        (spoiled(model={"path": "x"}), "model: it must name its class"),
        (spoiled(model__type="leapalign.models.sd3.SD4"), "unknown configuration class .*SD4; did you mean 'SD3'"),
        (spoiled(model__type="leapalign.models.sd5.SD5"), "no module is named leapalign.models.sd5"),
        (spoiled(model__type="leapalign.methods.leapalign.LeapAlign"), "not a class of leapalign.models"),
        (spoiled(model__type="os.system"), "os.system is not a class of leapalign.models"),
        (spoiled(model__type="leapalign.models.sd3.dataclass"), "unknown configuration class"),
        (spoiled(model__type="my.py:Mine"), "give it with --plugin path/to/my.py"),
        (spoiled(method__nested_scale=7), "method: LeapAlign: got nested_scale=7.0"),
        (spoiled(rewards__0__reward=3), r"rewards\[0\].reward: expected a configuration of leapalign.rewards"),
        (spoiled(type="leapalign.run.Runs"), "expected type leapalign.run.Run, got"),
        (spoiled(learning_rate=10**400), "learning_rate: the number is too large"),
        ('{"steps": NaN}', "NaN is not JSON"),
        (spoiled(learning_rate=0.125).replace("0.125", "1e999"), "learning_rate: inf is not finite"),
        ('{"steps": 1, "steps": 2}', "the key 'steps' appears twice"),
        ("[]", r"expected Run\(name=..., .*\), got a list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_odd_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        loads(text, Run)


def test_a_module_outside_the_package_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "bomb.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bomb.Bomb", "leapalign.models.bomb.Bomb", "leapalign.models..bomb.Bomb", "bomb.py:Bomb"):
        with pytest.raises(UserError):
            loads(spoiled(model__type=name), Run)


def test_a_users_class_comes_back_only_with_its_file():
    module = load_file(str(TINY_FILE))
    run = module.tiny()
    assert encode(run)["model"]["type"] == "tiny_recipe.py:TinyModel"
    with pytest.raises(UserError, match="--plugin"):
        loads(dumps(run), Run)
    assert loads(dumps(run), Run, plugins={TINY_FILE.name: module}) == run


@dataclass(frozen=True)
class Inner:
    size: float = 1.0


@dataclass(frozen=True)
class Outer:
    choice: Literal["a", 1] = "a"
    maybe: int | None = None
    pairs: tuple[tuple[str, float], ...] = ()
    table: dict[str, list[int]] | None = None
    inner: Inner | int = 3
    where: Path = Path("x")


def test_all_kinds_of_fields_round_trip():
    value = Outer(1, 5, (("x", 0.1), ("y", 2.0)), {"k": [1, 2]}, Inner(0.3), Path("a/b"))
    assert loads(dumps(value), Outer) == value
    assert loads(dumps(Outer()), Outer) == Outer()


def test_whole_numbers_become_floats_where_floats_belong():
    assert decode(float, 3) == 3.0 and type(decode(float, 3)) is float


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(UserError, match="cannot be written"):
        dumps(Inner(float("nan")))
    with pytest.raises(UserError, match="cannot be written"):
        dumps(Inner(object()))  # type: ignore[arg-type]


def test_the_hash_sees_what_changes_numbers_and_nothing_else():
    run = shapeworld_leapalign()
    same = replace(run, out="elsewhere", name="other", steps=7, checkpoint_every=3, keep_checkpoints=9)
    assert config_hash(encode(run)) == config_hash(encode(same))
    for other in (replace(run, seed=1), replace(run, method=replace(run.method, nested_scale=0.1))):
        assert config_hash(encode(run)) != config_hash(encode(other))


def test_differences_name_the_leaves():
    assert differences({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}}) == ["a.b[1]: 2 -> 3", "c: 1 -> null"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 30, "micro_batch_size": 8}, "use batch_size 24 or 32, or micro_batch_size 6 or 10"),
        ({"batch_size": 4, "micro_batch_size": 8}, "use batch_size 8, or micro_batch_size 4"),
        ({"micro_batch_size": 8, "samples_per_draw": 12}, "use samples_per_draw 8 or 16, or 0"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not finite"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0; it must lie in \[0, 1\)"),
        ({"rewards": ()}, "at least one reward"),
        ({"out": ""}, "needs a folder"),
    ],
)
def test_numbers_that_cannot_be_meant(changes, message):
    with pytest.raises(UserError, match=message):
        replace(shapeworld_leapalign(), **changes)


def test_a_value_in_python_gets_the_types_of_its_annotations():
    run = shapeworld_leapalign()
    term = replace(run.rewards[0], threshold=2, weight=1)
    whole = replace(run, rewards=[term], betas=[0.9, 0.99], max_grad_norm=1, tuning=LoRA(alpha=8))  # type: ignore
    assert dumps(whole) == dumps(loads(dumps(whole), Run))
    assert [type(whole.max_grad_norm), type(whole.rewards), type(whole.betas)] == [float, tuple, tuple]
    assert type(whole.rewards[0].threshold) is float and type(whole.tuning.alpha) is float  # type: ignore


def test_classes_are_found_in_the_value_itself():
    run = load_file(str(TINY_FILE)).tiny()
    found = classes_in(run)
    assert found["tiny_recipe.py:TinyModel"] is type(run.model) and found["leapalign.run.Run"] is Run
    assert decode(Run, encode(run), classes=found) == run


def test_a_class_without_a_file_is_refused():
    nowhere = make_dataclass("Nowhere", [("x", int)])
    nowhere.__module__ = "a_notebook"
    with pytest.raises(UserError, match="the class Nowhere is not defined in a file"):
        encode(nowhere(1))


def test_the_methods_that_a_plug_in_must_have_are_those_of_its_protocol():
    protocols = {"model": ModelConfig, "method": Method, "reward": RewardConfig, "prompts": Prompts, "tuning": Tuning}
    for field, protocol in protocols.items():
        for method, number in KINDS[field].calls.items():
            parameters = list(inspect.signature(getattr(protocol, method)).parameters.values())[1:]
            assert number == sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters), (field, method)

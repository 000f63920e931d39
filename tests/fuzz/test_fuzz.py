"""Whatever a user gives ends well or with one message: some hundred inputs here, thousands under the slow marker."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

import leapalign.cli
from fuzz import given
from fuzz.inputs import KINDS, LINES
from fuzz.sandbox import Change, Input
from leapalign.lookup.recipes import load_file

BENCHES = Path(__file__).parents[2] / "benches"
INPUTS, PROCESSES = 160, 2  # of the run in CI
SLOW_INPUTS, SLOW_PROCESSES = 2400, 50


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        yield load_file(str(BENCHES / "fuzzing.py"))


@pytest.fixture(scope="module")
def sandbox(bench, tmp_path_factory):
    with bench.sandbox(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@pytest.mark.parametrize(
    ("inputs", "processes"),
    [
        (INPUTS, PROCESSES),
        pytest.param(SLOW_INPUTS, SLOW_PROCESSES, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_every_input_ends_with_0_or_with_one_message(bench, tmp_path, inputs, processes, capfd):
    answer = bench.measure(bench.Fuzz(inputs=inputs, processes=processes), tmp_path)
    with capfd.disabled():
        print(f"\n{inputs} inputs, {processes} processes: {answer['kinds']}", file=sys.stderr)
    assert not answer["problems"], answer["problems"][:3]
    assert (answer["inputs"], answer["processes"]) == (inputs, processes)
    counted = [counts["inputs"].get("ended 0", 0) for counts in answer["kinds"].values()]
    assert len(counted) == len(KINDS)
    assert (all if inputs == SLOW_INPUTS else any)(counted)  # every kind of input gets past the first look


@pytest.mark.parametrize("line", [line for command, lines in LINES.items() if command != "demo" for line in lines])
def test_the_lines_that_are_spoilt_are_good(sandbox, line):
    outcome = sandbox.run(Input("valid", line))
    assert not outcome.problem, outcome
    assert outcome.status == (1 if "SHA256SUMS" in line else 0), outcome.err


@settings(max_examples=50, suppress_health_check=[*HealthCheck])
@drawn(data=st.data())
def test_inputs_are_wrong_in_many_ways_and_can_be_drawn_again(sandbox, data):
    """What is drawn is not the input as it was given, and is the same for the same random numbers."""
    kind = data.draw(st.sampled_from([*KINDS]))
    seed = data.draw(st.integers(0, 2**32))
    one, again = (KINDS[kind](Random(seed), sandbox.files) for _ in range(2))
    assert one == again and [c.content for c in one.changes] == [c.content for c in again.changes]
    assert one.kind == kind and (kind == "flags" or one.changes)


def _raises(argv):
    raise KeyError("a bug")


def _prints(text: str, status: int = 2):
    def main(argv):
        print(text, file=sys.stderr)
        return status

    return main


def _does(action):
    def main(argv):
        action()
        return 0

    return main


BROKEN = {  # a command line that is not as it must be, and what is said of it
    "an exception": (_raises, "KeyError: 'a bug'"),
    "another status": (_prints("leapalign: stopped at step 1: NaN", 3), "status 3"),
    "1 without a reason": (_prints("leapalign: no", 1), "status 1 without its reason"),
    "75 without a reason": (_prints("leapalign: no", 75), "status 75 without its reason"),
    "no message": (_prints("something went wrong"), "no message"),
    "two messages": (_prints("leapalign: one is wrong\nleapalign: two is wrong"), "more than one message"),
    "a word": (_prints("leapalign: no"), "a message of hardly a word"),
    "a dump": (_prints("leapalign: this came: " + "x" * 9000), "letters in 1 lines"),
    "pages": (_prints("leapalign: these came:" + "\nx" * 50), "letters in 51 lines"),
    "a terminal's code": (_prints("leapalign: this came: \x1b[31m"), "'\\x1b' in the message"),
    "an object": (_prints("leapalign: this came: <f object at 0x7f>"), "'object at 0x' in the message"),
    "a traceback": (_prints("Traceback (most recent call last)", 0), "a traceback"),
    "changed": (_does(lambda: Path("prompts.txt").write_text("mine")), "changed or removed: prompts.txt"),
    "same size": (_does(lambda: Path("drawbench.json").write_bytes(b"x" * 44)), "changed or removed: drawbench.json"),
    "removed": (_does(lambda: Path("sd3/model_index.json").unlink()), "changed or removed: sd3/model_index.json"),
    "elsewhere": (_does(lambda: Path("other").mkdir()), "written elsewhere: other"),
    "outside": (_does(lambda: Path("../other").write_text("x")), "wrote outside"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_sandbox_sees(bench, sandbox, monkeypatch, case):
    main, problem = BROKEN[case]
    monkeypatch.setattr(leapalign.cli, "main", main)
    assert problem in sandbox.run(Input("broken", ("list",))).problem
    (sandbox.box / "other").unlink(missing_ok=True)
    monkeypatch.undo()
    assert not sandbox.run(Input("good", ("list",))).problem  # what was damaged is whole again


def test_the_sandbox_sees_an_input_without_end(sandbox, monkeypatch):
    monkeypatch.setattr("fuzz.sandbox.SECONDS", 0.2)
    monkeypatch.setattr(leapalign.cli, "main", lambda argv: time.sleep(5))
    assert sandbox.run(Input("endless", ("list",))).problem == "no end after 0.2 s"


def test_a_change_never_reaches_the_given_files(sandbox):
    changes = [Change("sd3/vae/config.json", b"{"), Change("clip", instead="gone"), Change("run", instead="folder")]
    assert sandbox.run(Input("changed", ("train", "sd3.json"), tuple(changes))).status == 2
    assert not sandbox.run(Input("valid", ("train", "sd3.json"))).status


def test_a_named_folder_may_need_others_around_it(sandbox, monkeypatch):
    monkeypatch.setattr(leapalign.cli, "main", _does(lambda: Path("a/b/c").mkdir(parents=True)))
    assert not sandbox.run(Input("deep", ("export", "run", "--out", "a/b"))).problem
    assert "written elsewhere: a/b" in sandbox.run(Input("deep", ("export", "run", "--out", "a/d"))).problem


def test_too_few_inputs_are_an_error(bench, sandbox, monkeypatch):
    monkeypatch.setitem(KINDS, "flags", lambda rng, files: Input("flags", ("list", rng.choice("ab"))))
    with pytest.raises(RuntimeError, match="2 different inputs of the kind flags, expected 5"):
        [*bench.ended("flags", 5, sandbox, sandbox.run, 0)]


def test_given_files_are_of_every_family_and_reward(sandbox):
    assert {name.partition("/")[0] for name in sandbox.files} >= {*given.PIPELINES, *given.REWARDS, "run", "lora"}

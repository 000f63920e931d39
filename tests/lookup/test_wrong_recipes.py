"""A wrong recipe in Python: exit 2 and one sentence that names the field, what came and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.cli import main
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_recipe

HEAD = """
from dataclasses import dataclass, replace
from leapalign.codec import encode
from leapalign.methods import LeapAlign
from leapalign.models.sd3 import SD3
from leapalign.prompts import PromptFile
from leapalign.recipes.shapeworld import shapeworld_leapalign
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.tuning.lora import LoRA

R = shapeworld_leapalign()
TERM = RewardTerm(reward=PickScore(), threshold=1.0)

@dataclass(frozen=True)
class Odd:
    size: "Unknown" = 1
    def load(self, device, dtype): ...

@dataclass(frozen=True)
class Loads:
    size: float = 1
    def load(self): ...

class Plain:
    def load(self, device, dtype, tuning): ...
"""

WRONG = {
    "a reward without its term": ("rewards=(PickScore(),)", r"rewards\[0\]: expected RewardTerm\(.*, got a PickScore"),
    "a bare term": ("rewards=TERM", r"rewards: expected a list, got a RewardTerm; write \(RewardTerm\(...\),\)"),
    "a class for an instance": ("model=SD3", r"model: expected a config.*, got the class SD3; write SD3\(path=...\)"),
    "a class in a term": (
        "rewards=(RewardTerm(reward=PickScore, threshold=1),)",
        r"RewardTerm: reward: expected a .*, got the class PickScore|reward: expected .* the class PickScore; write",
    ),
    "a word for the method": (
        "method='leapalign'",
        'method: expected a .* of leapalign.methods, got a text "leapalign"',
    ),
    "a word for the model": ("model='sd3'", 'model: expected a configuration of leapalign.models, got a text "sd3"'),
    "a word for the prompts": ("prompts='p.txt'", 'prompts: expected a .* of leapalign.prompts, got a text "p.txt"'),
    "model and method swapped": ("model=R.method, method=R.model", "model: .*LeapAlign is not a class of .*models"),
    "a text for a number": ("learning_rate='3e-4'", 'learning_rate: expected a number, got a text "3e-4"'),
    "a text for a whole number": ("steps='300'", 'steps: expected a whole number, got a text "300"'),
    "a number for a whole number": ("steps=3.0", "steps: expected a whole number, got a number 3.0"),
    "a number for yes or no": ("self_checks=1", "self_checks: expected true or false, got a whole number 1"),
    "a text inside a model": ("model=SD3(path='a', height='512')", "model.height: expected a whole number, got a text"),
    "a text that a method compares": ("method=LeapAlign(nested_scale='1')", "LeapAlign: nested_scale: expected a num"),
    "a text that a tuning compares": ("tuning=LoRA(rank='8')", 'LoRA: rank: expected a whole number, got a text "8"'),
    "one number of a pair": ("betas=(0.9,)", "betas: expected 2 values, got 1"),
    "nothing": ("tuning=None", "tuning: expected a configuration of leapalign.tuning, got nothing"),
    "a function": (
        "model=shapeworld_leapalign",
        "model: expected a configuration .*, got the function shapeworld_leap",
    ),
    "no dataclass": ("model=Plain()", "model: expected a configuration of leapalign.models, got a Plain"),
    "an own class of another kind": ("model=Loads()", r"model: my.py:Loads has no load\(\) that takes 4 arguments"),
    "an annotation from nowhere": ("model=Odd()", r"my.py:Odd|model: my.py:Odd has no load"),
    "a word of a choice": ("graph='block'", "graph: 'block' is not one of .*did you mean 'blocks'"),
    "not a number": ("learning_rate=float('nan')", "learning_rate: nan is not finite"),
    "an unknown field": (
        "learning_rat=1.0",
        r"my.py:bad, line \d+: TypeError: .*unexpected keyword argument 'learning_",
    ),
    "an unknown name": ("steps=nowhere", r"my.py:bad, line \d+: NameError: name 'nowhere' is not defined"),
    "a value out of range": ("steps=0", "steps is 0; it must be at least 1"),
}


def written(folder: Path, body: str) -> str:
    file = folder / "my.py"
    file.write_text(f"{HEAD}\n{body}\n")
    return f"{file}:bad"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_exit_2_and_one_sentence(name, tmp_path, capsys):
    change, message = WRONG[name]
    word = written(tmp_path, f"def bad():\n    return replace(R, {change})")
    assert main(["train", word, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    with pytest.raises(UserError, match=message):
        load_recipe(word, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def bad(): return encode(R)", "bad is a dict; a recipe is a function that returns a leapalign Run"),
        ("def bad(): ...", "bad is a NoneType; a recipe is"),
        ("def bad(size): return R", r"my.py:bad: TypeError: bad\(\) missing 1 required positional argument: 'size'"),
        ("def good(): return R", "the file defines no 'bad'"),
        ("def bad(: ...", r"my.py, line 2\d: "),
        ("import nowhere_at_all", r"my.py, line 2\d: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("1 / 0", r"my.py, line 2\d: ZeroDivisionError"),
    ],
)
def test_a_file_that_gives_no_run(body, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_recipe(written(tmp_path, body), {})


def test_a_whole_number_where_a_float_belongs_is_that_float(tmp_path):
    word = written(tmp_path, "def bad(): return replace(R, max_grad_norm=1, tuning=LoRA(alpha=8))")
    dotted = written(tmp_path, "def bad(): return replace(R, max_grad_norm=1.0, tuning=LoRA(alpha=8.0))")
    assert load_recipe(word, {}) == load_recipe(dotted, {})

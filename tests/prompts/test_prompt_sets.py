"""Published prompt sets on small files of the same layout, GenEval's training set, and what can be wrong with them."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from leapalign.cli import main
from leapalign.codec import decode, encode
from leapalign.errors import UserError
from leapalign.prompts import Prompt, PromptFile
from leapalign.prompts.geneval import RATIO, GenEvalPrompts, claim, generate, train_prompts
from leapalign.prompts.sets import DrawBench, HPDv2, MJHQ30k, choose

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture
def files(tmp_path):
    """The published layouts: pairs and rankings of pictures, an object of objects, a list of texts."""
    pair = {"human_preference": [1, 0], "file_path": ["1.jpg", "2.jpg"], "user_hash": "x"}
    train = [{"prompt": f"prompt {i // 2}", **pair} for i in range(80)] + [{"prompt": "  ", **pair}]
    test = [{"prompt": f"test {i}", "image_path": ["1.jpg"], "rank": [1]} for i in range(4)]
    mjhq = {f"{i:x}": {"category": "people", "prompt": f"a person {i} "} for i in range(60)}
    contents = {"train": train, "test": test, "meta_data": mjhq, "drawbench": ["one", "two"]}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_each_published_layout(files):
    assert texts(HPDv2(path=str(files / "train.json")).load()) == [f"prompt {i}" for i in range(40)]
    assert texts(HPDv2(split="test", path=str(files / "test.json")).load()) == [f"test {i}" for i in range(4)]
    assert texts(DrawBench(path=str(files / "drawbench.json")).load()) == ["one", "two"]


def test_a_sample_is_the_seeds_and_does_not_depend_on_the_files_order(files):
    some = HPDv2(num=10, path=str(files / "train.json"))
    assert len(some.load()) == 10
    assert texts(some.load()) != texts(replace(some, seed=1).load())
    content = [prompt.text for prompt in replace(some, num=0).load()]
    assert set(texts(choose(content[::-1], 10, 0))) == set(texts(some.load()))


def test_the_split_of_mjhq(files):
    test = MJHQ30k(split="test", test_size=7, path=str(files / "meta_data.json"))
    train = replace(test, split="train")
    assert len(test.load()) == 7
    assert len(train.load()) == 53
    assert not set(texts(test.load())) & set(texts(train.load()))
    assert set(texts(test.load())) != set(texts(replace(test, split_seed=1).load()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a list of prompts"),
        ("3", "expected a list of prompts"),
        ('["a", 3]', "entry 1: expected a text"),
        ('[{"text": "a"}]', "entry 0: expected a text"),
        ('["a", "a"]', "this set has 1 different prompts"),
    ],
)
def test_what_can_be_wrong_with_a_file(tmp_path, content, message):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=message):
        HPDv2(num=2, path=str(tmp_path / "train.json")).load()


def test_a_split_must_leave_some(files):
    with pytest.raises(UserError, match="test_size 500 of 60"):
        MJHQ30k(path=str(files / "meta_data.json")).load()


@pytest.mark.parametrize("prompts", [HPDv2(), HPDv2(split="test"), MJHQ30k(), DrawBench()])
def test_offline_it_says_what_to_do(prompts, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    told = rf"{prompts.source.file} of {prompts.source.repo}: HF_HUB_OFFLINE forbids"
    with pytest.raises(UserError, match=f"{told}.*hf download --repo-type dataset {prompts.source.repo}"):
        prompts.load()


def test_without_a_network_it_does_not_try_again_for_half_a_minute(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(UserError, match="hf download --repo-type dataset ymhao/HPDv2"):
        HPDv2().load()
    assert time.monotonic() - begun < 10


def test_a_file_of_the_cache_is_read(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "datasets--ymhao--HPDv2"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (home / "snapshots" / ("0" * 40) / "test.json").write_text(json.dumps([{"prompt": "a cat"}]))
    assert HPDv2(split="test").load() == [Prompt("a cat")]
    with pytest.raises(UserError, match=r"train\.json of ymhao/HPDv2 are not in the hub's cache"):
        HPDv2().load()


# GenEval


def reworded(record: dict) -> str:
    """A second derivation of a claim, as a sorted sentence: each object with colour and count, relations one way."""
    things = sorted(f"{i['count']} {i.get('color', '')} {i['class']}" for i in record["include"])
    if record["tag"] == "position":
        b, a = (item["class"] for item in record["include"])
        relation = record["include"][1]["position"][0]
        things = [f"{b} {OPPOSITE[relation]} {a}" if relation in ("right of", "below") else f"{a} {relation} {b}"]
    return f"{record['tag']}: {things}"


def test_no_test_prompt_is_trained_on_in_either_order():
    tested = {reworded(record) for record in generate(43, 100)}
    trained = train_prompts(20_000, 3)
    assert not tested & {reworded(record) for record in trained}
    assert len({claim(record) for record in trained}) == len({reworded(record) for record in trained})
    assert not {record["prompt"] for record in trained} & {record["prompt"] for record in generate(43, 100)}


def test_swapped_words_are_one_claim():
    def of(tag, *include):
        return claim({"tag": tag, "include": list(include)})

    cup, dog = {"class": "cup", "count": 1}, {"class": "dog", "count": 1}
    assert of("two_object", cup, dog) == of("two_object", dog, cup)
    left, right = {"position": ["left of", 0]}, {"position": ["right of", 0]}
    assert of("position", cup, dog | left) == of("position", dog, cup | right)
    assert of("position", cup, dog | left) != of("position", dog, cup | left)
    red, blue = {"color": "red"}, {"color": "blue"}
    assert of("color_attr", cup | red, dog | blue) == of("color_attr", dog | blue, cup | red)
    assert of("color_attr", cup | red, dog | blue) != of("color_attr", cup | blue, dog | red)


def test_the_training_set_has_the_ratio_and_repeats_small_tasks_only():
    records = train_prompts(5_000, 0)
    counts = Counter(record["tag"] for record in records)
    assert sum(counts.values()) == 5_000
    for tag, part in RATIO.items():
        assert abs(counts[tag] - 5_000 * part / 17) < 1
    distinct = Counter(tag for tag, _ in {(record["tag"], record["prompt"]) for record in records})
    for tag in ("position", "color_attr", "two_object", "colors"):
        assert distinct[tag] == counts[tag]
    assert distinct["counting"] == 160  # 240 less 80
    assert records == train_prompts(5_000, 0) != train_prompts(5_000, 1)
    assert [len(train_prompts(num, 0)) for num in (1, 2, 17)] == [1, 2, 17]


def test_geneval_needs_numbers_that_make_sense():
    with pytest.raises(UserError, match="expected 1 to"):
        GenEvalPrompts(num=0)


# run.json and the command line


def test_run_json_knows_them():
    for prompts in (HPDv2(num=3), MJHQ30k(), DrawBench(), GenEvalPrompts(), PromptFile(path="x.txt")):
        assert decode(Any, encode(prompts), where="run.json: prompts") == prompts
    assert encode(PromptFile(path="x.txt"))["type"] == "leapalign.prompts.PromptFile"  # as older runs wrote it


def test_list_prompts(capsys):
    assert main(["list", "prompts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["prompts"]
    assert {each["name"] for each in found} == {"file", "shapeworld", "hpdv2", "mjhq-30k", "drawbench", "geneval"}
    assert all(each["text"] and each["licence"] for each in found)

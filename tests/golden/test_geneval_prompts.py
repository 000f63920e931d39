"""GenEval's generator against its published files and digests: byte for byte."""

from __future__ import annotations

import hashlib
import json

import pytest

from golden_folder import golden
from leapalign.prompts.geneval import OBJECTS, RATIO, GenEvalPrompts, generate, metadata_file, shares

FACTS = "facts.json"


def facts() -> dict:
    return json.loads((golden("geneval_prompts") / FACTS).read_text())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def texts(records: list[dict]) -> str:
    return "".join(record["prompt"] + "\n" for record in records)


def test_every_recorded_run():
    runs = facts()["runs"]
    assert len(runs) == 4
    for run in runs:
        records = generate(run["seed"], run["n"])
        assert digest(metadata_file(records)) == run["sha256_evaluation_metadata"]
        assert digest(texts(records)) == run["sha256_generation_prompts"]
        assert {tag: sum(r["tag"] == tag for r in records) for tag in run["tags"]} == run["tags"]


@pytest.mark.parametrize(("seed", "num", "suffix"), [(43, 100, ""), (7, 5, "_seed7_n5")])
def test_the_stored_files(seed, num, suffix):
    folder, records = golden("geneval_prompts"), generate(seed, num)
    assert metadata_file(records) == (folder / f"evaluation_metadata{suffix}.jsonl").read_text()
    assert texts(records) == (folder / f"generation_prompts{suffix}.txt").read_text()


def test_the_test_set_is_the_published_one():
    records = [prompt.metadata for prompt in GenEvalPrompts(split="test").load()]
    assert digest(metadata_file(records)) == facts()["official_553_sha256"]  # type: ignore[arg-type]


def test_the_names_of_things():
    assert digest("\n".join(OBJECTS) + "\n") == facts()["object_names_sha256"]


def test_the_training_mix():
    mix = facts()["flow_grpo_training_mix"]
    for total, counts in mix["counts_by_total"].items():
        assert shares(int(total), RATIO) == counts
    assert {tag: RATIO[tag] / 10 for tag in RATIO} == dict(zip(mix["task_order"], mix["weights"]))

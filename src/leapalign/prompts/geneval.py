"""GenEval's prompts (arXiv 2310.11513): the 553 test prompts, and training prompts disjoint from them.

The test prompts are generated, not shipped: `generate(43, 100)` gives the published file of 553 lines byte for byte
(tests/golden/test_geneval_prompts.py). Its wordings and their quirks ("knifes") are those of `geneval.wording`.

Training prompts are ours, in the ratio of arXiv 2505.05470, which arXiv 2604.15311 trains on (Sec. 6.1): position 7,
counting 5, attribute binding 3, colors 1, two objects 1, single object 0. Departures from that set's public script:
- *claims* are held out, so "a photo of a cup and a dog" also excludes "a photo of a dog and a cup", and "a left of b"
  excludes "b right of a"; the script compares texts only;
- prompts are drawn from all combinations of a task, not from a sample of them, so fewer are repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, permutations, product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leapalign.geneval.wording import (
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    Metadata,
    bound,
    colored,
    counted,
    positioned,
    single,
    two,
)
from leapalign.prompts.base import Prompt, check_generated

if TYPE_CHECKING:
    import numpy as np

OBJECTS = (  # COCO's 80, in its order, three of them with GenEval's longer names
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PEOPLE = 1  # "person" is first and never coloured
RATIO = {"position": 7, "color_attr": 3, "colors": 1, "counting": 5, "two_object": 1}  # this order breaks ties
TEST_SEED, TEST_NUM = 43, 100


@dataclass(frozen=True, kw_only=True)
class GenEvalPrompts:
    """GenEval's 553 test prompts, or 50,000 generated training prompts without any of them."""

    name: ClassVar[str] = "geneval"
    licence: ClassVar[str] = "generated here (Apache-2.0); the test prompts equal those of GenEval (MIT)"

    split: Literal["train", "test"] = "train"
    num: int = 50_000  # training prompts
    seed: int = 0  # selects the training prompts; not the run's seed

    def __post_init__(self) -> None:
        check_generated("geneval", self.num, self.seed)

    def load(self) -> list[Prompt]:
        records = train_prompts(self.num, self.seed) if self.split == "train" else generate(TEST_SEED, TEST_NUM)
        return [Prompt(text=record["prompt"], metadata=record) for record in records]


def generate(seed: int, num: int) -> list[Metadata]:
    """Run GenEval's own generator: every object once, then `num` draws of each other task, without repetitions."""
    import numpy as np

    rng = np.random.default_rng(seed)
    records = [single(OBJECTS[i]) for i in rng.choice(len(OBJECTS), len(OBJECTS), replace=False)]
    for draw in (_draw_two, _draw_counted, _draw_colored, _draw_positioned, _draw_bound):
        records += [draw(rng) for _ in range(num)]
    unique: dict[str, Metadata] = {}
    for record in records:
        unique.setdefault(record["prompt"], record)
    return list(unique.values())


def metadata_file(records: Iterable[Metadata]) -> str:
    """Return evaluation_metadata.jsonl as GenEval writes it."""
    return "".join(json.dumps(record) + "\n" for record in records)


def _draw_two(rng: np.random.Generator) -> Metadata:
    a, b = rng.choice(len(OBJECTS), 2, replace=False)
    return two(OBJECTS[a], OBJECTS[b])


def _draw_counted(rng: np.random.Generator) -> Metadata:
    return counted(OBJECTS[rng.choice(len(OBJECTS))], int(rng.integers(min(NUMBERS), max(NUMBERS), endpoint=True)))


def _draw_colored(rng: np.random.Generator) -> Metadata:
    return colored(OBJECTS[rng.choice(len(OBJECTS) - PEOPLE) + PEOPLE], COLORS[rng.choice(len(COLORS))])


def _draw_positioned(rng: np.random.Generator) -> Metadata:
    a, b = rng.choice(len(OBJECTS), 2, replace=False)
    return positioned(OBJECTS[a], RELATIONS[rng.choice(len(RELATIONS))], OBJECTS[b])


def _draw_bound(rng: np.random.Generator) -> Metadata:
    a, b = rng.choice(len(OBJECTS) - PEOPLE, 2, replace=False) + PEOPLE
    c, d = rng.choice(len(COLORS), 2, replace=False)
    return bound(OBJECTS[a], COLORS[c], OBJECTS[b], COLORS[d])


# Training


def train_prompts(num: int, seed: int) -> list[Metadata]:
    """Generate `num` shuffled training prompts in RATIO; a task repeats prompts only when all are used."""
    import numpy as np

    rng = np.random.default_rng([seed, TEST_SEED])
    tested = {claim(record) for record in generate(TEST_SEED, TEST_NUM)}
    chosen = []
    for tag, count in shares(num, RATIO).items():
        pool = list(sayings(tag))
        unseen = (pool[i] for i in rng.permutation(len(pool)) if _claim(tag, pool[i]) not in tested)
        words = list(islice(unseen, count))
        if len(words) < count:  # a small task repeats its prompts
            words += [words[i] for i in rng.integers(len(words), size=count - len(words))]
        chosen += [_WORDED[tag](*each) for each in words]
    return [chosen[i] for i in rng.permutation(num)]


def shares(total: int, ratio: Mapping[str, int]) -> dict[str, int]:
    """Split `total` in the ratio: rounded down, the rest goes to the largest remainders."""
    whole = sum(ratio.values())
    counts = {tag: total * part // whole for tag, part in ratio.items()}
    by_remainder = sorted(ratio, key=lambda tag: -(total * ratio[tag] % whole))  # stable: ties in the ratio's order
    for tag in by_remainder[: total - sum(counts.values())]:
        counts[tag] += 1
    return counts


def sayings(tag: str) -> Iterator[tuple[Any, ...]]:
    """List all combinations of a task, as arguments of its wording."""
    things = OBJECTS[PEOPLE:]
    if tag == "two_object":
        return permutations(OBJECTS, 2)
    if tag == "counting":
        return product(OBJECTS, NUMBERS)
    if tag == "colors":
        return product(things, COLORS)
    if tag == "position":
        return ((a, relation, b) for a, b in permutations(OBJECTS, 2) for relation in RELATIONS)
    return ((a, c, b, d) for a, b in permutations(things, 2) for c, d in permutations(COLORS, 2))


_WORDED = {"two_object": two, "counting": counted, "colors": colored, "position": positioned, "color_attr": bound}


def claim(record: Metadata) -> tuple[Any, ...]:
    """Return a prompt's claim, independent of word order."""
    tag, include = record["tag"], record["include"]
    names = [item["class"] for item in include]
    colors = [item.get("color") for item in include]
    if tag == "position":  # the reference object is first in the metadata
        return _claim(tag, (names[1], include[1]["position"][0], names[0]))
    if tag == "counting":
        return _claim(tag, (names[0], include[0]["count"]))
    if tag == "color_attr":
        return _claim(tag, (names[0], colors[0], names[1], colors[1]))
    return _claim(tag, (names[0], colors[0]) if tag == "colors" else tuple(names))


def _claim(tag: str, words: tuple[Any, ...]) -> tuple[Any, ...]:
    if tag == "two_object":
        return tag, *sorted(words)
    if tag == "position":
        a, relation, b = words
        return (tag, *words) if relation in ("left of", "above") else (tag, b, OPPOSITE[relation], a)
    if tag == "color_attr":
        return tag, *sorted((words[:2], words[2:]))
    return tag, *words

"""Captions of ShapeWorld scenes in GenEval's six tasks, and scenes that show them.

A *combination* is the claim of a caption, whatever the order of its words: "a circle left of a square" and "a square
right of a circle" are one combination. Training and test prompts share no combination, except for single objects, of
which only six exist.
"""

from __future__ import annotations

from itertools import combinations, permutations
from typing import TYPE_CHECKING

from leapalign.geneval.wording import (
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    TASKS,
    Metadata,
    bound,
    colored,
    counted,
    positioned,
    single,
    two,
)
from leapalign.shapeworld.world import CELLS, COLORS, MAX_OBJECTS, SHAPES, Scene, place

if TYPE_CHECKING:
    import numpy as np

TRAIN_RATIO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
HELD_OUT = {"single_object": 6, "two_object": 5, "counting": 6, "colors": 12, "position": 20, "color_attr": 100}
SPLIT_SEED = 2604  # selects the test combinations; must not change, or old runs would have trained on them


def all_captions(tag: str) -> list[list[Metadata]]:
    """List every combination of a task, each as the list of its wordings."""
    pairs = list(combinations(SHAPES, 2))
    if tag == "single_object":
        return [[single(s)] for s in SHAPES]
    if tag == "two_object":
        return [[two(a, b), two(b, a)] for a, b in pairs]
    if tag == "counting":
        return [[counted(s, n)] for s in SHAPES for n in NUMBERS]
    if tag == "colors":
        return [[colored(s, c)] for s in SHAPES for c in COLORS]
    if tag == "position":
        return [[positioned(a, r, b), positioned(b, OPPOSITE[r], a)] for a, b in pairs for r in RELATIONS]
    if tag == "color_attr":
        return [[bound(a, c, b, d), bound(b, d, a, c)] for a, b in pairs for c, d in permutations(COLORS, 2)]
    raise ValueError(f"task {tag!r} is not one of {', '.join(TASKS)}")


def split(tag: str) -> tuple[list[list[Metadata]], list[list[Metadata]]]:
    """(training, test) combinations of a task, disjoint but for `single_object`, where both are all six."""
    import numpy as np

    everything = all_captions(tag)
    if tag == "single_object":
        return everything, everything
    order = np.random.default_rng([SPLIT_SEED, TASKS.index(tag)]).permutation(len(everything))
    cut = HELD_OUT[tag]
    return [everything[i] for i in order[cut:]], [everything[i] for i in order[:cut]]


def draw(captions: list[list[Metadata]], rng: np.random.Generator) -> Metadata:
    wordings = captions[rng.integers(len(captions))]
    return wordings[rng.integers(len(wordings))]


def train_prompts(num: int, seed: int = 0) -> list[Metadata]:
    """Draw `num` training prompts, tasks in GenEval's ratio 7:5:3:1:1:0 (position first), with replacement."""
    import numpy as np

    rng = np.random.default_rng(seed)
    pools = {tag: split(tag)[0] for tag in TRAIN_RATIO}
    share = np.asarray(list(TRAIN_RATIO.values()), float)
    tags = rng.choice(list(TRAIN_RATIO), size=num, p=share / share.sum())
    return [draw(pools[str(tag)], rng) for tag in tags]


def validation_prompts(per_task: int, seed: int = 0) -> list[Metadata]:
    """Draw `per_task` prompts a task from the training combinations, with replacement.

    For choosing settings: unlike `train_prompts`, as many of each task, and unlike `evaluation_prompts`, no combination
    of the test set.
    """
    import numpy as np

    rng = np.random.default_rng([seed, SPLIT_SEED])
    return [draw(split(tag)[0], rng) for tag in TASKS for _ in range(per_task)]


def evaluation_prompts(per_task: int | None = None) -> list[Metadata]:
    """Return the test prompts in both wordings; with `per_task`, repeated in cycles to that many prompts a task."""
    prompts = []
    for tag in TASKS:
        wordings = [caption for combination in split(tag)[1] for caption in combination]
        count = len(wordings) if per_task is None else per_task
        prompts += [wordings[i % len(wordings)] for i in range(count)]
    return prompts


# Scenes for captions

_NEIGHBOURS = {  # cells (a, b) with a in the relation to b
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}


def _any_color(rng: np.random.Generator) -> str:
    return list(COLORS)[rng.integers(len(COLORS))]


def scene_of(caption: Metadata, rng: np.random.Generator) -> Scene:
    """Draw a random scene for which the caption is true, without objects that it does not name."""
    include = caption["include"]
    wanted = [(item["class"], item.get("color")) for item in include for _ in range(item["count"])]
    cells = [int(c) for c in rng.permutation(len(CELLS))[: len(wanted)]]
    if caption["tag"] == "position":
        places = _NEIGHBOURS[include[1]["position"][0]]
        a, b = places[rng.integers(len(places))]
        cells = [b, a]
    objects = [place(s, c or _any_color(rng), cell, rng) for (s, c), cell in zip(wanted, cells)]
    return tuple(objects[i] for i in rng.permutation(len(objects)))


def near_misses(caption: Metadata) -> list[Metadata]:
    """Return adversarial negatives: captions of similar words that are false for every `scene_of(caption)`."""
    include, tag = caption["include"], caption["tag"]
    shapes = [item["class"] for item in include]
    others = [s for s in SHAPES if s not in shapes]
    if tag == "single_object":
        return [single(s) for s in others]
    if tag == "two_object":
        return [two(shapes[0], s) for s in others] + [two(s, shapes[1]) for s in others]
    if tag == "counting":
        n = include[0]["count"]
        return [counted(shapes[0], m) for m in NUMBERS if m != n] + [counted(s, n) for s in others]
    if tag == "colors":
        color = include[0]["color"]
        return [colored(shapes[0], c) for c in COLORS if c != color] + [colored(s, color) for s in others]
    if tag == "position":
        (b, a), relation = shapes, include[1]["position"][0]
        turned = [positioned(a, r, b) for r in RELATIONS if r != relation] + [positioned(b, relation, a)]
        return turned + [positioned(s, relation, b) for s in others] + [positioned(a, relation, s) for s in others]
    (a, b), (c, d) = shapes, (item["color"] for item in include)
    free = [e for e in COLORS if e not in (c, d)]
    recolored = [bound(a, e, b, d) for e in free] + [bound(a, c, b, e) for e in free]
    reshaped = [bound(s, c, b, d) for s in others] + [bound(a, c, s, d) for s in others]
    return [bound(a, d, b, c)] * 4 + recolored + reshaped


def contrast(caption: Metadata, index: int) -> Metadata:
    """Return a caption of the same task that differs in the task's own claim alone; `index` cycles through several.

    Another shape (single object), second shape, number, colour or relation; for attribute binding the colours change
    places. It is one of the first `near_misses`, and false for every `scene_of(caption)`.
    """
    others = len(SHAPES) - len(caption["include"])
    same_kind = {"counting": len(NUMBERS) - 1, "colors": len(COLORS) - 1, "position": len(RELATIONS) - 1}
    count = same_kind | {"single_object": others, "two_object": others, "color_attr": 1}
    return near_misses(caption)[index % count[caption["tag"]]]


assert max(NUMBERS) <= MAX_OBJECTS

"""GenEval's wording (arXiv 2310.11513): the prompt and the metadata of each of its six tasks, for any nouns.

Metadata is {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?, "prompt"}.
"""

from __future__ import annotations

from typing import Any

Metadata = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def plural(noun: str) -> str:
    """GenEval's plural, which says "knifes"."""
    return noun + ("es" if noun.endswith("s") else "s")


def article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def single(noun: str) -> Metadata:
    """One object."""
    include = [{"class": noun, "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {article(noun)}"}


def two(a: str, b: str) -> Metadata:
    """Two objects."""
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {article(a)} and {article(b)}"}


def counted(noun: str, n: int) -> Metadata:
    """Exactly `n` objects."""
    return {
        "tag": "counting",
        "include": [{"class": noun, "count": n}],
        "exclude": [{"class": noun, "count": n + 1}],
        "prompt": f"a photo of {NUMBERS[n]} {plural(noun)}",
    }


def colored(noun: str, color: str) -> Metadata:
    """One object of a colour."""
    include = [{"class": noun, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {article(f'{color} {noun}')}"}


def positioned(a: str, relation: str, b: str) -> Metadata:
    """`a` in `relation` to `b`; GenEval lists the reference object first."""
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of {article(a)} {relation} {article(b)}"}


def bound(a: str, color_a: str, b: str, color_b: str) -> Metadata:
    """Two objects, each with its colour."""
    include = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
    words = f"{article(f'{color_a} {a}')} and {article(f'{color_b} {b}')}"
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {words}"}

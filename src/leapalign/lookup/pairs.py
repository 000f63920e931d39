"""Resolve words to pairs of prompts (first, second) for the swap test."""

from __future__ import annotations

from collections.abc import Sequence

from leapalign.errors import UserError
from leapalign.lookup.prompts import prompts_of
from leapalign.prompts import Prompt, ShapeWorldPrompts
from leapalign.prompts.base import check_text

Pair = tuple[Prompt, Prompt]


def pairs_of(own: Sequence[tuple[str, str]], word: str, per_task: int) -> list[Pair]:
    """Return the user's `own` pairs or, if there are none, one for each prompt of `word` (empty: ShapeWorld's).

    The prompt is the second of its pair. The first is, for captions of ShapeWorld, one that differs in the own claim of
    the task alone, and for others the next prompt of the same task. Raises UserError if both are given.
    """
    if own and word:
        raise UserError("diagnose: give either --pair or --prompts")
    if own:
        return [(Prompt(check_text(a, "--pair")), Prompt(check_text(b, "--pair"))) for a, b in own]
    prompts = prompts_of(word or ShapeWorldPrompts.name, per_task).load()
    return _neighbours(prompts) if word not in ("", ShapeWorldPrompts.name) else _contrasts(prompts)


def _contrasts(prompts: Sequence[Prompt]) -> list[Pair]:
    from leapalign.shapeworld.captions import contrast

    others = [contrast(prompt.metadata or {}, i) for i, prompt in enumerate(prompts)]
    return [(Prompt(other["prompt"], other), prompt) for other, prompt in zip(others, prompts)]


def _neighbours(prompts: Sequence[Prompt]) -> list[Pair]:
    """Pair each prompt with the next one of its task that has another text."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.metadata or {}).get("tag", ""), []).append(prompt)
    return [(_next(group, i), prompt) for group in groups.values() for i, prompt in enumerate(group)]


def _next(group: Sequence[Prompt], i: int) -> Prompt:
    for other in (*group[i + 1 :], *group[:i]):
        if other.text != group[i].text:
            return other
    raise UserError(f"--prompts: {group[i].text!r} is the only prompt of its task; a swap needs two different ones")

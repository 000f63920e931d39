"""One thing that was looked at: what came, what was expected, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Check:
    part: str  # of the pipeline, or what of a reward
    check: str
    state: Literal["good", "different", "note"]  # a note says something that nothing can be compared with
    came: str
    expected: str = ""
    remedy: str = ""


def good(part: str, check: str, came: str, expected: str = "") -> Check:
    return Check(part=part, check=check, state="good", came=came, expected=expected)


def different(part: str, check: str, came: str, expected: str, remedy: str) -> Check:
    return Check(part=part, check=check, state="different", came=came, expected=expected, remedy=remedy)


def note(part: str, check: str, came: str, remedy: str = "") -> Check:
    return Check(part=part, check=check, state="note", came=came, remedy=remedy)


def within(part: str, check: str, difference: float, tolerance: float, remedy: str) -> Check:
    """Good if the difference is at most the tolerance; NaN is not."""
    came, expected = f"{difference:.2g}", f"at most {tolerance:.2g}"
    if difference <= tolerance:
        return good(part, check, came, expected)
    return different(part, check, came, expected, remedy)


def some(names: list[str]) -> str:
    """The first few of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

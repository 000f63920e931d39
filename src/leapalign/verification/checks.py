"""The result of one check: the found value, the expected value, and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Check:
    part: str  # the pipeline's component, or the reward and its source
    check: str
    state: Literal["good", "different", "note"]  # a note has nothing to compare with
    came: str  # the found value
    expected: str = ""
    remedy: str = ""


def good(part: str, check: str, came: str, expected: str = "") -> Check:
    return Check(part=part, check=check, state="good", came=came, expected=expected)


def different(part: str, check: str, came: str, expected: str, remedy: str) -> Check:
    return Check(part=part, check=check, state="different", came=came, expected=expected, remedy=remedy)


def note(part: str, check: str, came: str, remedy: str = "") -> Check:
    return Check(part=part, check=check, state="note", came=came, remedy=remedy)


def within(part: str, check: str, difference: float, tolerance: float, remedy: str) -> Check:
    """Return a good check if `difference` is at most `tolerance`, else a different one; NaN is different."""
    came, expected = f"{difference:.2g}", f"at most {tolerance:.2g}"
    if difference <= tolerance:
        return good(part, check, came, expected)
    return different(part, check, came, expected, remedy)


def some(names: list[str]) -> str:
    """Join the first three names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
